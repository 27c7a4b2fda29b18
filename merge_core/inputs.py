"""What a worker reads: the base's files and the adapters', opened once for all of its shards."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial

import torch

from merge_core.blocks import block_rows
from merge_core.decoded import fetch_from, read_rows
from merge_core.decoding.stored import Rows
from merge_core.factors import FactorSource
from merge_core.lanes import TORCH_DTYPES, aligned
from merge_core.layout import TensorSpec
from merge_core.plan import MergePlan, Shard, Source, TensorTask
from merge_core.read_ahead import ReadAhead, Room
from merge_core.read_blocks import Range
from merge_core.storage import SLACK
from merge_core.stores.location import Location
from merge_core.stores.opening import check_unchanged, fetch, open_store
from merge_core.stores.store import Reader
from merge_core.updates.factor import KEPT_TENSORS, Factor
from merge_core.updates.tuning import Tuning


class Inputs:
    """The open inputs of a plan. Threads may share it.

    Raises:
        StorageError: an adapter or a base file changed since the plan was made.
    """

    def __init__(self, plan: MergePlan) -> None:
        self.plan = plan
        self.tasks = {task.target.name: task for task in plan.tasks}
        with contextlib.ExitStack() as inputs:
            opened = inputs.enter_context
            self.factors = [opened(closing(FactorSource(one))) for one in plan.adapters]
            base = open_store(plan.base)
            self._base: list[Reader] = [
                opened(closing(base.open(file))) for file in plan.base_files
            ]
            self._opened = inputs.pop_all()
        self._readers = self._base
        self._ahead: dict[int, ReadAhead] = {}
        self._room = Room()
        self._whole: set[int] = set()
        self._kept = _Kept(KEPT_TENSORS * len(plan.adapters))

    def read(self, source: Source, first: int, behind: int, into: memoryview) -> memoryview:
        """Bytes of a tensor that is stored as it is, see ``stream.Read``."""
        if source.file is not None:
            reader = self._readers[source.file]
            return reader.read_into(into, source.tensor.offset + first, behind - first)
        if source.adapter is None:
            raise AssertionError("a source is in a file of the base or of an adapter")
        view = into[: behind - first]
        stored = source.within or source.tensor
        skipped = source.tensor.offset - stored.offset
        part = self.factors[source.adapter].part(stored, skipped + first, skipped + behind)
        view[:] = part
        return view

    def shared(self, adapter: int, tensor: TensorSpec) -> torch.Tensor:
        """A tensor of an adapter in float32 on the host, kept for who asks for it next."""

        def load() -> torch.Tensor:
            return self.factors[adapter].load(tensor, torch.device("cpu"))

        return self._kept.get((adapter, tensor.name), load)

    def of(self, task: TensorTask, device: torch.device) -> TaskInputs:
        """Those of one task."""
        loaded = None
        if task.source.decoding is not None:
            loaded = task.source.decoding.load(partial(fetch_from, self._readers))
        return TaskInputs(self, task, device, loaded)

    @contextlib.contextmanager
    def fetched_ahead(self, shard: Shard, then: Shard | None = None) -> Iterator[None]:
        """Have what a shard needs of files in stores fetched before it is asked for, while inside.

        On a local disk there is nothing to gain. With ``Access.cache`` its files come whole first,
        here and not in a thread, so that who waits for gigabytes can stop it.

        Args:
            then: the shard that is next: its first blocks are fetched while the last ones of this
                one are merged and sent, and are there when it is entered.
        """
        if self.plan.base.access.cache:
            self._fetch_whole(shard)
        with contextlib.ExitStack() as inside:
            for number, source in enumerate(self.factors):
                used = (tensor for task in shard.tasks for tensor in task.read_of(number))
                inside.enter_context(source.fetched_ahead(used))
            if not self.plan.base.is_local:
                ahead = inside.enter_context(closing(self._ahead_of(shard, then)))
                inside.callback(setattr, self, "_readers", self._base)
                self._readers = [ahead.reader(number) for number in range(len(self._base))]
            yield

    def _ahead_of(self, shard: Shard, then: Shard | None) -> ReadAhead:
        if self.plan.base.access.cache:  # whole files: nothing of the next one is asked for yet
            then = None
        wanted = [shard] if then is None else [shard, then]
        # What is read again, or instead of what was expected, needs the room.
        kept = {one.index for one in wanted} if shard.index in self._ahead else set[int]()
        for other in self._ahead.keys() - kept:
            self._ahead.pop(other).close()
        for one in wanted:
            if one.index not in self._ahead:
                ranges = [each for task in one.tasks for each in _ranges(task)]
                self._ahead[one.index] = ReadAhead(self._base, ranges, self._room)
        mine = self._ahead.pop(shard.index)
        mine.then = None if then is None else self._ahead[then.index]
        return mine

    def _fetch_whole(self, shard: Shard) -> None:
        for number in sorted(_base_files(shard) - self._whole):
            file = self.plan.base_files[number]
            fetch(self.plan.base, file)
            reader = open_store(self.plan.base).open(file)
            self._base[number] = self._opened.enter_context(closing(reader))
            self._whole.add(number)

    def check(self, shard: Shard) -> None:
        """Make sure that what a shard was made from is still what was planned with.

        Raises:
            StorageError: it is not.
        """
        sources = [task.source for task in shard.tasks]
        for file in _base_files(shard):
            check_unchanged(self.plan.base, self.plan.base_files[file])
        for number in {source.adapter for source in sources if source.adapter is not None}:
            adapter = self.plan.adapters[number]
            check_unchanged(adapter.path, adapter.file)

    def close(self) -> None:
        """Close the files."""
        for ahead in self._ahead.values():
            ahead.close()
        self._opened.close()


def _base_files(shard: Shard) -> set[int]:
    """The files of the base that it is made from."""
    return set[int]().union(*(task.source.base_files for task in shard.tasks))


def _ranges(task: TensorTask) -> Iterator[Range]:
    """What is read of the base's files for it."""
    for file, tensor in ((one.file, one.tensor) for one in task.source.stored):
        yield Range(file, tensor.offset, tensor.offset + tensor.nbytes)


class _Kept:
    """The tensors that were asked for last, at most so many. Threads may share it."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._tensors: dict[tuple[int, str], torch.Tensor] = {}
        self._lock = threading.Lock()

    def get(self, key: tuple[int, str], load: Callable[[], torch.Tensor]) -> torch.Tensor:
        with self._lock:  # also while it is loaded: who else asks wants the same one
            tensor = self._tensors.pop(key, None)
            if tensor is None:
                while len(self._tensors) >= self._most:
                    del self._tensors[next(iter(self._tensors))]
                tensor = load()
            self._tensors[key] = tensor  # behind all others
            return tensor


@dataclass(frozen=True, slots=True)
class TaskInputs:
    """See ``updates.loading.Loading``."""

    inputs: Inputs
    task: TensorTask
    device: torch.device
    loaded: Rows | None
    """What its source is decoded from, if it is."""

    def read(self, first: int, behind: int, into: memoryview) -> memoryview:
        """See ``stream.Read``."""
        if self.loaded is None:
            return self.inputs.read(self.task.source, first, behind, into)
        row_bytes = self.task.source.tensor.shape[1] * self.task.source.dtype_bytes
        return read_rows(self.loaded, row_bytes, first, behind, into)

    def factor(self, adapter: int, tensor: TensorSpec) -> torch.Tensor:
        """See ``Loading``."""
        return self.inputs.factors[adapter].load(tensor, self.device)

    def matrix(self, adapter: int, factor: Factor) -> torch.Tensor:
        """See ``Loading``."""
        if factor.is_stored:
            return self.factor(adapter, factor.tensor)
        return factor.taken_from(self.inputs.shared(adapter, factor.tensor)).to(self.device)

    def base_rows(self) -> Iterator[tuple[int, torch.Tensor]]:
        """See ``Loading``."""
        (rows, width), source = self.task.matrix, self.task.source
        row_bytes, step = width * source.dtype_bytes, block_rows(width, self.device.type)
        buffer = aligned(step * row_bytes + SLACK, self.device).numpy().data
        for top in range(0, rows, step):
            bottom = min(top + step, rows)
            view = self.read(top * row_bytes, bottom * row_bytes, buffer)
            stored = torch.frombuffer(view, dtype=TORCH_DTYPES[source.tensor.dtype])
            yield top, stored.view(-1, width).to(self.device, torch.float32)

    def whole(self, name: str | None = None) -> torch.Tensor:
        """See ``Loading``."""
        if name is not None:
            return self.inputs.of(self.inputs.tasks[name], self.device).whole()
        (rows, width), shape = self.task.matrix, self.task.source.tensor.shape
        into = torch.empty((rows, width), dtype=torch.float32, device=self.device)
        for top, part in self.base_rows():
            into[top : top + len(part)] = part
        return into.view(shape)

    def tuning(self, adapter: int) -> Tuning:
        """See ``Loading``."""
        found = self.inputs.plan.adapters[adapter].tuning
        if found is None:
            raise AssertionError("what PEFT merges has a tuning")
        return found

    def path(self, adapter: int) -> Location:
        """See ``Loading``."""
        return self.inputs.plan.adapters[adapter].path

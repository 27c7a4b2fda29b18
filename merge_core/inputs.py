"""What a worker reads: the base's files and the adapters', opened once for all of its shards."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch

from merge_core.blocks import block_rows
from merge_core.factors import FactorSource
from merge_core.lanes import TORCH_DTYPES, aligned
from merge_core.layout import TensorSpec
from merge_core.plan import MergePlan, Shard, TensorTask
from merge_core.storage import SLACK, RangeReader
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
            for file in plan.base_files:
                file.check(plan.base)
            paths = [plan.base / file.name for file in plan.base_files]
            self._readers = [opened(closing(RangeReader(path))) for path in paths]
            self._opened = inputs.pop_all()

    def read(self, task: TensorTask, first: int, behind: int, into: memoryview) -> memoryview:
        """See ``stream.Read``."""
        source = task.source
        if source.file is not None:
            reader = self._readers[source.file]
            return reader.read_into(into, source.tensor.offset + first, behind - first)
        if source.adapter is None:
            raise AssertionError("a source is in a file of the base or of an adapter")
        view = into[: behind - first]
        view[:] = self.factors[source.adapter].part(source.tensor, first, behind)
        return view

    def of(self, task: TensorTask, device: torch.device) -> TaskInputs:
        """Those of one task's updates."""
        return TaskInputs(self, task, device)

    def check(self, shard: Shard) -> None:
        """Make sure that what a shard was made from is still what was planned with.

        Raises:
            StorageError: it is not.
        """
        sources = [task.source for task in shard.tasks]
        for file in {source.file for source in sources if source.file is not None}:
            self.plan.base_files[file].check(self.plan.base)
        for number in {source.adapter for source in sources if source.adapter is not None}:
            adapter = self.plan.adapters[number]
            adapter.file.check(adapter.path)

    def close(self) -> None:
        """Close the files."""
        self._opened.close()


@dataclass(frozen=True, slots=True)
class TaskInputs:
    """See ``updates.loading.Loading``."""

    inputs: Inputs
    task: TensorTask
    device: torch.device

    def factor(self, adapter: int, tensor: TensorSpec) -> torch.Tensor:
        """See ``Loading``."""
        return self.inputs.factors[adapter].load(tensor, self.device)

    def base_rows(self) -> Iterator[tuple[int, torch.Tensor]]:
        """See ``Loading``."""
        return self._rows_of(self.task)

    def stored(self, adapter: int, tensor: TensorSpec) -> torch.Tensor:
        """See ``Loading``."""
        return self.inputs.factors[adapter].load(tensor, self.device)

    def whole(self, name: str | None = None) -> torch.Tensor:
        """See ``Loading``."""
        task = self.task if name is None else self.inputs.tasks[name]
        (rows, width), shape = task.matrix, task.source.tensor.shape
        into = torch.empty((rows, width), dtype=torch.float32, device=self.device)
        for top, part in self._rows_of(task):
            into[top : top + len(part)] = part
        return into.view(shape)

    def tuning(self, adapter: int) -> Tuning:
        """See ``Loading``."""
        found = self.inputs.plan.adapters[adapter].tuning
        if found is None:
            raise AssertionError("what PEFT merges has a tuning")
        return found

    def path(self, adapter: int) -> Path:
        """See ``Loading``."""
        return self.inputs.plan.adapters[adapter].path

    def _rows_of(self, task: TensorTask) -> Iterator[tuple[int, torch.Tensor]]:
        (rows, width), source = task.matrix, task.source
        row_bytes, step = width * source.dtype_bytes, block_rows(width, self.device.type)
        buffer = aligned(step * row_bytes + SLACK, self.device).numpy().data
        for top in range(0, rows, step):
            bottom = min(top + step, rows)
            view = self.inputs.read(task, top * row_bytes, bottom * row_bytes, buffer)
            stored = torch.frombuffer(view, dtype=TORCH_DTYPES[source.tensor.dtype])
            yield top, stored.view(-1, width).to(self.device, torch.float32)

"""Streaming one shard: its tensors, cut into cells of the digest grid, through the lanes.

Lanes are threads that take the next cell of the file, so that one reads while another multiplies
and a third writes. Nothing here depends on which lane takes what: a cell's bytes, its digest and
its place in the file are fixed by the plan.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from functools import partial

import torch

from merge_core.background import in_background, leave
from merge_core.digest import CELL_BYTES, new_cell, tensor_digest
from merge_core.errors import NonFiniteError
from merge_core.kernel import LoadedUpdates
from merge_core.lanes import Lane
from merge_core.layout import DTYPE_BYTES
from merge_core.ledger import TensorRecord
from merge_core.plan import Shard, TensorTask
from merge_core.stores.store import PartWriter
from merge_core.updates.piece import Change, Piece

Read = Callable[[int, int, memoryview], memoryview]
"""Fetches bytes of a task's source, from one to behind another, into a page aligned buffer with
SLACK to spare, and returns the view of them in there."""

TICK_SECONDS = 0.2
"""How often the waiting thread reports progress; also the longest that Ctrl-C has to wait."""


@dataclass(frozen=True, slots=True)
class LoadedTask:
    """What a task needs, at hand."""

    read: Read
    updates: LoadedUpdates


@dataclass(slots=True)
class TensorWork:
    """One tensor under way, shared by the lanes that work on its cells."""

    task: TensorTask
    load: Callable[[TensorTask], LoadedTask]
    cells: list[bytes] = field(init=False)
    """Digests, filled in as cells finish, in any order."""
    change: Change = field(default_factory=Change)
    seconds: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])
    """Reading, merging, writing."""
    _left: int = field(init=False)
    _loaded: LoadedTask | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self._left = -(-self.task.target.nbytes // CELL_BYTES)
        self.cells = [b""] * self._left

    def loaded(self) -> LoadedTask:
        """What it needs, loaded by the first lane that asks and freed with the last cell."""
        with self._lock:
            if self._loaded is None:
                self._loaded = self.load(self.task)
            return self._loaded

    def finish_cell(self, number: int, digest: bytes, change: Change, spent: list[float]) -> None:
        """Note that a cell is written."""
        with self._lock:
            self.cells[number] = digest
            self.change.add(change)
            self.seconds = [a + b for a, b in zip(self.seconds, spent, strict=True)]
            self._left -= 1
            if self._left == 0:
                self._loaded = None

    def record(self) -> TensorRecord:
        """The ledger's row, once every cell is written."""
        target, merged = self.task.target, bool(self.task.updates)
        read, merge, write = self.seconds
        return TensorRecord(
            tensor=target.name,
            action=self.task.action,
            dtype=target.dtype,
            shape=target.shape,
            nbytes=target.nbytes,
            digest=tensor_digest(self.cells),
            bytes_read=self.task.source.bytes_read,
            bytes_written=target.nbytes,
            read_seconds=read,
            merge_seconds=merge,
            write_seconds=write,
            base_norm=math.sqrt(self.change.base_square) if merged else None,
            delta_norm=math.sqrt(self.change.delta_square) if merged else None,
            largest_change=self.change.largest if merged else None,
        )


def stream_shard(
    shard: Shard,
    *,
    part: PartWriter,
    load: Callable[[TensorTask], LoadedTask],
    lanes: Sequence[Lane],
    read_bytes: int,
    watch: Callable[[int], None],
) -> tuple[TensorRecord, ...]:
    """Write the whole of ``shard`` into ``part`` and say what was done to each tensor.

    Args:
        load: opens the values that a tensor starts from, and fetches its updates to the device.
        read_bytes: output bytes that pass a lane at once; divides the digest's cell.
        watch: called every TICK_SECONDS, and once at the end, with the bytes written so far.
            What it raises ends the streaming and is raised here.

    Raises:
        NonFiniteError: a merged value is NaN or infinite.
        StorageError: a read or write failed.
        DeviceMemoryError: a lane could not get memory.
    """
    works = [TensorWork(task=task, load=load) for task in shard.tasks]
    part.write_small(shard.layout().header, 0)
    run = _Run(_cells_of(works), part, read_bytes)
    run.wait_for(lanes, watch)
    return tuple(work.record() for work in works)


_Cell = tuple[TensorWork, int, int, int]
"""The tensor, the number of the cell, and its first byte and the byte behind it."""


def _cells_of(works: Sequence[TensorWork]) -> Iterator[_Cell]:
    for work in works:
        for number in range(len(work.cells)):
            first = number * CELL_BYTES
            yield work, number, first, min(first + CELL_BYTES, work.task.target.nbytes)


class _Run:
    """The lanes at work on one shard."""

    def __init__(
        self,
        cells: Iterator[_Cell],
        part: PartWriter,
        read_bytes: int,
    ) -> None:
        self._cells, self._part = cells, part
        self._read_bytes = read_bytes
        self._lock = threading.Lock()
        self._stopped = False
        self._error: BaseException | None = None
        self._written = 0

    def wait_for(self, lanes: Sequence[Lane], watch: Callable[[int], None]) -> None:
        """Start a thread a lane, report progress, and raise the first error of any.

        Whoever stops it from outside does not wait for lanes that wait for a store that is gone.
        """
        working: list[Future[None]] = []
        try:
            working += [in_background(partial(self._work, lane)) for lane in lanes]
            for one in working:
                while wait([one], TICK_SECONDS).not_done:
                    watch(self._written)
            watch(self._written)
        finally:
            self._stopped = True
            leave(working)
        if self._error is not None:
            raise self._error

    def _work(self, lane: Lane) -> None:
        torch.set_num_threads(1)  # the block's borders assume it, and lanes fill the cores
        try:
            while (cell := self._next()) is not None:
                self._pass(cell, lane)
        except BaseException as error:  # noqa: BLE001 - handed to the waiting thread, which raises it
            with self._lock:
                self._error = self._error or error
            self._stopped = True

    def _next(self) -> _Cell | None:
        with self._lock:
            return None if self._stopped else next(self._cells, None)

    def _pass(self, cell: _Cell, lane: Lane) -> None:
        """Bring one cell through the lane, piece by piece."""
        work, number, first, behind = cell
        loaded = work.loaded()
        spent, change, digest = [0.0, 0.0, 0.0], Change(), new_cell()
        for start in range(first, behind, self._read_bytes):
            end = min(start + self._read_bytes, behind)
            clock = time.perf_counter()
            piece, source = _piece(work.task, start, end)
            data = loaded.read(*source, lane.inbox_view)
            clock = _lap(spent, 0, clock)
            out, changed = _transform(work.task, loaded.updates, piece, data, lane)
            change.add(changed)
            digest.update(out)
            clock = _lap(spent, 1, clock)
            if self._stopped:  # nobody may be waiting, and the part be gone
                return
            self._part.write(out, work.task.target.offset + start)
            _lap(spent, 2, clock)
            with self._lock:
                self._written += end - start
        work.finish_cell(number, digest.digest(), change, spent)


def _piece(task: TensorTask, start: int, end: int) -> tuple[Piece, tuple[int, int]]:
    """The elements in the output bytes ``start`` ... ``end`` of a tensor, and the bytes of its
    source that they depend on.
    """
    size, (rows, width) = DTYPE_BYTES[task.target.dtype], task.matrix
    if task.as_bytes:  # of any dtype, be it one that fills no byte
        piece = Piece(matrix=(rows, width), first=start, behind=end, source_first=start)
        return piece, (start, end)
    first, behind = start // size, end // size
    low, high = first, behind
    if task.whole_rows:
        low, high = first // width * width, -(-behind // width) * width
    piece = Piece(matrix=(rows, width), first=first, behind=behind, source_first=low)
    return piece, (low * task.source.dtype_bytes, high * task.source.dtype_bytes)


def _transform(
    task: TensorTask, updates: LoadedUpdates, piece: Piece, data: memoryview, lane: Lane
) -> tuple[memoryview, Change]:
    try:
        return lane.transform(task, updates, piece, data)
    except NonFiniteError as error:
        raise NonFiniteError(error.what, f"tensor {task.target.name}", error.remedy) from None


def _lap(spent: list[float], phase: int, since: float) -> float:
    now = time.perf_counter()
    spent[phase] += now - since
    return now

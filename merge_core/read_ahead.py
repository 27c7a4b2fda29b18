"""What is going to be read of files in a store, fetched in blocks before it is asked for.

A store answers a request after some hundredths of a second, whatever its size, and no connection
is fast. So what lies close together is one request, what is long is several, some of them are
always under way, and each is asked for once, however small the pieces are that a lane takes.
"""

from __future__ import annotations

import bisect
import itertools
import mmap
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from merge_core.storage import SLACK
from merge_core.stores.store import Reader

GAP_BYTES = 128 << 10
"""Read over rather than asking again: at most 1.6 % of the shortest block that is followed by one.
The time of a request is that of some MB."""

BLOCK_BYTES = 8 << 20
"""Of a block of what is long, up to twice that: see ``stores.blocks.BLOCK_BYTES``."""

IN_FLIGHT = 8
"""Requests at the same time, beside the uploads that as many lanes are waiting for."""

AHEAD = 8
"""Blocks that are fetched before a lane wants them, so that no lane waits where the store is fast
enough. About as many more are held that lanes are in the middle of."""

MOST_BYTES = 2 * AHEAD * 2 * BLOCK_BYTES
"""That are held at a time; about half of it where what is read is long."""


@dataclass(frozen=True, slots=True, order=True)
class Range:
    """Bytes of a file, from one to behind another."""

    file: int
    """Number of its reader."""
    first: int
    behind: int

    @property
    def nbytes(self) -> int:
        """How many."""
        return self.behind - self.first


def blocks_of(ranges: Sequence[Range]) -> dict[Range, int]:
    """The requests that bring ``ranges``, in the order in which these come first, each with the
    bytes of it that are wanted.
    """
    blocks = []
    for run in _runs(ranges, GAP_BYTES):
        count = max(1, run.nbytes // BLOCK_BYTES)
        borders = [run.first + run.nbytes * n // count for n in range(count + 1)]
        blocks += [Range(run.file, *pair) for pair in itertools.pairwise(borders)]
    order = {block: 0 for wanted in ranges for block in _overlapping(blocks, wanted)}
    for wanted in _runs(ranges, 0):
        for block in _overlapping(blocks, wanted):
            order[block] += min(block.behind, wanted.behind) - max(block.first, wanted.first)
    return order


def _runs(ranges: Iterable[Range], gap: int) -> Iterator[Range]:
    """What lies no further apart than ``gap`` bytes, as one, sorted."""
    run: Range | None = None
    for each in sorted(one for one in ranges if one.nbytes):
        if run and each.file == run.file and each.first <= run.behind + gap:
            run = Range(run.file, run.first, max(run.behind, each.behind))
            continue
        if run:
            yield run
        run = each
    if run:
        yield run


def _overlapping(blocks: Sequence[Range], wanted: Range) -> Iterator[Range]:
    """Those of the sorted ``blocks`` that hold bytes of ``wanted``, which has no gap."""
    start = bisect.bisect_right(
        blocks, (wanted.file, wanted.first), key=lambda block: (block.file, block.behind)
    )
    for number in range(start, len(blocks)):
        block = blocks[number]
        if block.file != wanted.file or block.first >= wanted.behind:
            return
        if block.behind > wanted.first:
            yield block


@dataclass(slots=True)
class _Fetched:
    """A block that is there, or on its way."""

    buffer: memoryview
    data: Future[memoryview]
    left: int
    """Bytes that are wanted and were not taken yet."""
    takers: int = 0


class ReadAhead:
    """Serves ranges of files out of blocks. Threads may share it.

    Args:
        readers: of the files.
        ranges: what will be read, about in that order. Anything else is read when it is asked for,
            and so is what is asked for again after it was taken.
        ahead: blocks that are fetched before they are asked for.
    """

    def __init__(
        self, readers: Sequence[Reader], ranges: Sequence[Range], ahead: int = AHEAD
    ) -> None:
        self._readers, self._ahead = readers, ahead
        self._wanted = blocks_of(ranges)
        self._order, self._sorted = list(self._wanted), sorted(self._wanted)
        self._number = {block: number for number, block in enumerate(self._order)}
        self._largest = max((block.nbytes for block in self._order), default=0)
        self._begun: set[int] = set()
        self._there: dict[Range, _Fetched] = {}
        self._spare: list[memoryview] = []
        self._lock = threading.Lock()
        self._threads = ThreadPoolExecutor(IN_FLIGHT, "ahead")

    def reader(self, file: int) -> Reader:
        """One that reads out of the blocks where it can."""
        return _Reader(self, file)

    def read_into(self, target: memoryview, wanted: Range) -> None:
        """Fill ``target`` with ``wanted``.

        Raises:
            StorageError: as the file's reader does.
        """
        done = wanted.first
        for block in _overlapping(self._sorted, wanted):
            until = max(done, block.first)
            self._read(target[done - wanted.first :], Range(wanted.file, done, until))
            part = Range(wanted.file, until, min(wanted.behind, block.behind))
            into = target[part.first - wanted.first : part.behind - wanted.first]
            if not self._take(into, part, block):
                self._read(into, part)
            done = part.behind
        self._read(target[done - wanted.first :], Range(wanted.file, done, wanted.behind))

    def close(self) -> None:
        """Wait for what is under way, and let go of everything."""
        self._threads.shutdown(cancel_futures=True)
        self._there.clear()
        self._spare.clear()

    def _read(self, target: memoryview, part: Range) -> None:
        """Without a block."""
        if part.nbytes:
            target[: part.nbytes] = self._readers[part.file].read(part.first, part.nbytes)

    def _take(self, target: memoryview, part: Range, block: Range) -> bool:
        """Copy ``part`` out of its block; False if that was let go of already."""
        with self._lock:
            self._start(self._number[block])
            fetched = self._there.get(block)
            if fetched is None:
                return False
            fetched.takers += 1
        taken = part.nbytes
        try:
            data = fetched.data.result()
            target[:] = data[part.first - block.first : part.behind - block.first]
        except BaseException:
            taken = fetched.left  # whoever wants it again has it read anew
            raise
        finally:
            with self._lock:
                fetched.takers -= 1
                fetched.left -= taken
                if fetched.left <= 0:
                    self._let_go(block)
        return True

    def _start(self, number: int) -> None:
        """Have a block fetched, and those that come next while there is room."""
        self._begin(number)
        for ahead in range(number + 1, min(number + 1 + self._ahead, len(self._order))):
            if not self._has_room(number):
                return
            self._begin(ahead)

    def _begin(self, number: int) -> None:
        if number in self._begun:
            return
        self._begun.add(number)
        block = self._order[number]
        buffer = self._spare.pop() if self._spare else self._allocated()
        data = self._threads.submit(self._fetch, block, buffer)
        self._there[block] = _Fetched(buffer, data, self._wanted[block])

    def _has_room(self, number: int) -> bool:
        """Also makes it: what is wanted of a block may be asked for late, or never."""
        if len(self._there) >= 2 * self._ahead:
            oldest = next(iter(self._there))
            if self._number[oldest] < number - self._ahead:
                self._let_go(oldest)
        return len(self._there) < 2 * self._ahead

    def _let_go(self, block: Range) -> None:
        fetched = self._there.get(block)
        if fetched is not None and fetched.data.done() and not fetched.takers:
            del self._there[block]
            self._spare.append(fetched.buffer)

    def _allocated(self) -> memoryview:
        return memoryview(mmap.mmap(-1, self._largest + SLACK))

    def _fetch(self, block: Range, buffer: memoryview) -> memoryview:
        return self._readers[block.file].read_into(buffer, block.first, block.nbytes)


class _Reader:
    """See ``store.Reader``."""

    def __init__(self, ahead: ReadAhead, file: int) -> None:
        self._ahead, self._file = ahead, file

    def read_into(self, buffer: memoryview, offset: int, nbytes: int) -> memoryview:
        view = buffer[:nbytes]
        self._ahead.read_into(view, Range(self._file, offset, offset + nbytes))
        return view

    def read(self, offset: int, nbytes: int) -> memoryview:
        # From the system itself: malloc would keep what is freed, in each thread's own arena.
        return self.read_into(memoryview(mmap.mmap(-1, max(nbytes, 1))), offset, nbytes)

    def close(self) -> None:
        """It holds nothing of its own."""

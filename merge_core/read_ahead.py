"""What is going to be read of files in a store, fetched in blocks before it is asked for.

A store answers a request after some hundredths of a second, whatever its size, and no connection
is fast. So what lies close together is one request, what is long is several, some of them are
always under way, and each is asked for once, however small the pieces are that a lane takes.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial

from merge_core.background import in_background, leave
from merge_core.read_blocks import BLOCK_BYTES, KEPT_BYTES, Range, blocks_of, overlapping
from merge_core.storage import SLACK, own_memory
from merge_core.stores.store import Reader

AHEAD = 4
"""Blocks that are fetched before a lane wants them: a lane that uploads what it merged finds its
next block there."""

MOST = 8
"""Blocks that are held: those that lanes are in the middle of, and those ahead. As many at the end
of a shard, for the next one, while the last lanes upload. Also the most requests at a time, beside
the uploads that lanes are waiting for."""

BEHIND = 2
"""Blocks, beyond those that are held, after which one gives way of which not all was taken: no lane
is so far behind the first, and what is wanted of a block may never be asked for."""

MOST_BYTES = MOST * 2 * BLOCK_BYTES
"""That are held at a time; about half of it where what is read is long."""


class Room:
    """Memory for blocks, for one ``ReadAhead`` after the other.

    Args:
        most: blocks that are held.
    """

    def __init__(self, most: int = MOST) -> None:
        self.most, self.held = most, 0
        self.lock = threading.Lock()
        self._spare: list[memoryview] = []

    def take(self) -> memoryview:
        """Memory for a block, be there too many or not."""
        self.held += 1
        return self._spare.pop() if self._spare else memoryview(mmap.mmap(-1, _LARGEST))

    def give(self, buffer: memoryview) -> None:
        """Take it back."""
        self.held -= 1
        if len(self._spare) < self.most:
            self._spare.append(buffer)


_LARGEST = 2 * BLOCK_BYTES + KEPT_BYTES + SLACK
"""Of a block, see ``read_blocks.blocks_of``. Pages that are not reached take no memory."""


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
        room: where blocks are held; what others hold there counts.
    """

    def __init__(self, readers: Sequence[Reader], ranges: Sequence[Range], room: Room) -> None:
        self._readers, self._room, self._lock = readers, room, room.lock
        self._wanted = blocks_of(ranges)
        self._order, self._sorted = list(self._wanted), sorted(self._wanted)
        self._number = {block: number for number, block in enumerate(self._order)}
        self._small = self._small_of(ranges)
        self._kept: dict[Range, memoryview] = {}
        self._begun: set[int] = set()
        self._there: dict[Range, _Fetched] = {}
        self._closed = False
        self.then: ReadAhead | None = None
        """What is read after this one: it has the room that is left when all is under way here."""

    def reader(self, file: int) -> Reader:
        """One that reads out of the blocks where it can."""
        return _Reader(self, file)

    def read_into(self, target: memoryview, wanted: Range) -> None:
        """Fill ``target`` with ``wanted``.

        Raises:
            StorageError: as the file's reader does.
        """
        if self._copy_kept(target, wanted):
            return
        done = wanted.first
        for block in overlapping(self._sorted, wanted):
            until = max(done, block.first)
            self._read(target[done - wanted.first :], Range(wanted.file, done, until))
            part = Range(wanted.file, until, min(wanted.behind, block.behind))
            into = target[part.first - wanted.first : part.behind - wanted.first]
            if not self._take(into, part, block):
                self._read(into, part)
            done = part.behind
        self._read(target[done - wanted.first :], Range(wanted.file, done, wanted.behind))

    def close(self) -> None:
        """Let go of everything, once what is under way has come. What a store that is gone still
        owes is not waited for, and keeps its memory.
        """
        with self._lock:
            self._closed = True
            there = list(self._there.values())
            self._there.clear()
            self._kept.clear()
        leave(one.data for one in there)
        with self._lock:
            for one in there:
                if one.data.done():
                    self._room.give(one.buffer)

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

    def _small_of(self, ranges: Iterable[Range]) -> dict[Range, list[Range]]:
        """What to keep of each block."""
        small: dict[Range, list[Range]] = {}
        for each in {one for one in ranges if 0 < one.nbytes <= KEPT_BYTES}:
            block = next(overlapping(self._sorted, each))
            if block.first <= each.first and each.behind <= block.behind:
                small.setdefault(block, []).append(each)
        return small

    def _copy_kept(self, target: memoryview, wanted: Range) -> bool:
        """Copy what is kept of its block, once that is there; False for what is not kept."""
        block = next(overlapping(self._sorted, wanted), None)
        if block is None or wanted not in self._small.get(block, ()):
            return False
        self._take(target[:0], Range(wanted.file, wanted.first, wanted.first), block)
        if wanted not in self._kept:
            return False
        target[:] = self._kept[wanted]
        return True

    def _start(self, number: int) -> None:
        """Have a block fetched, and those that come next while there is room."""
        self._make_room(number)
        self._begin(number)
        self.begin_ahead(number + 1, AHEAD)
        self._begin_then()

    def begin_ahead(self, first: int, count: int) -> None:
        """Have some blocks fetched that nobody waits for; under the room's lock."""
        for number in range(first, min(first + count, len(self._order))):
            if self._room.held >= self._room.most:
                return
            self._begin(number)

    def _begin_then(self) -> None:
        if self.then is not None and len(self._begun) == len(self._order):
            self.then.begin_ahead(0, self._room.most)

    def _begin(self, number: int) -> None:
        if number in self._begun or self._closed:
            return
        self._begun.add(number)
        block = self._order[number]
        buffer = self._room.take()
        data = in_background(partial(self._fetch, block, buffer))
        self._there[block] = _Fetched(buffer, data, self._wanted[block])

    def _make_room(self, number: int) -> None:
        if self._there and self._room.held >= self._room.most:
            oldest = next(iter(self._there))
            if self._number[oldest] <= number - self._room.most - BEHIND:
                self._let_go(oldest)

    def _let_go(self, block: Range) -> None:
        fetched = self._there.get(block)
        if fetched is not None and fetched.data.done() and not fetched.takers:
            del self._there[block]
            self._room.give(fetched.buffer)
            self._begin_then()

    def _fetch(self, block: Range, buffer: memoryview) -> memoryview:
        data = self._readers[block.file].read_into(buffer, block.first, block.nbytes)
        for small in self._small.get(block, ()):
            some = data[small.first - block.first : small.behind - block.first]
            self._kept[small] = memoryview(bytes(some))
        return data


class _Reader:
    """See ``store.Reader``."""

    def __init__(self, ahead: ReadAhead, file: int) -> None:
        self._ahead, self._file = ahead, file

    def read_into(self, buffer: memoryview, offset: int, nbytes: int) -> memoryview:
        view = buffer[:nbytes]
        self._ahead.read_into(view, Range(self._file, offset, offset + nbytes))
        return view

    def read(self, offset: int, nbytes: int) -> memoryview:
        return self.read_into(own_memory(nbytes), offset, nbytes)

    def close(self) -> None:
        """It holds nothing of its own."""

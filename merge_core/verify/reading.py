"""Reading tensor data as fast as the disk gives it, in a few threads with reused buffers.

Reads go past the page cache (O_DIRECT) where the file system has it: what is compared then comes
from the disk and not from the memory that was just written, and nothing is thrown out of the
cache. Elsewhere an ordinary descriptor does the same, and tells the kernel to forget the pages.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import queue
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, Self, TypeVar

import numpy as np

from merge_core.stores.location import Location
from merge_core.stores.opening import open_file
from merge_core.verify.places import Bytes

LANES = 4
"""Threads of one file check. One reads while others hash or compute; more gained nothing on one
disk, and each costs two buffers."""

PAGE = 4096
"""O_DIRECT wants offset, length and buffer on borders of the device's blocks; 4096 suits all."""

_HAS_DIRECT = hasattr(os, "O_DIRECT")
_HAS_FADVISE = hasattr(os, "posix_fadvise")

Buffers = tuple[memoryview, memoryview]
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class Reader:
    """One file, opened for reads of ranges; safe to share between threads.

    Raises:
        OSError: from the constructor and from ``read``.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._plain = os.open(path, os.O_RDONLY)
        self._direct: int | None = None
        with contextlib.suppress(OSError):  # refused by tmpfs and some network file systems
            self._direct = os.open(path, os.O_RDONLY | os.O_DIRECT) if _HAS_DIRECT else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._plain)
        if self._direct is not None:
            os.close(self._direct)

    def read(self, start: int, nbytes: int, buffer: memoryview) -> Bytes:
        """Bytes ``start`` to ``start + nbytes`` of the file, as a view into ``buffer``.

        ``buffer`` starts on a page and has two pages more than ``nbytes``, because the range
        is widened to page borders.
        """
        first = start - start % PAGE
        needed = start + nbytes - first
        wanted = -(-needed // PAGE) * PAGE
        have = 0
        while have < needed:
            got = self._read_some(first + have, buffer[have:wanted])
            if got == 0:
                raise OSError(errno.EIO, f"the file ends at byte {first + have}", self._path)
            have += got
        return np.frombuffer(buffer, np.uint8, nbytes, start - first)

    def _read_some(self, offset: int, into: memoryview) -> int:
        if self._direct is not None:
            try:
                return os.preadv(self._direct, [into], offset)
            except OSError as error:
                # Refused at read: a file system that only pretends, or behind an odd end.
                if error.errno != errno.EINVAL:
                    raise
        got = os.preadv(self._plain, [into], offset)
        if _HAS_FADVISE:
            os.posix_fadvise(self._plain, offset, got, os.POSIX_FADV_DONTNEED)
        return got


class Remote:
    """A file in a store, behind the same interface, as it is now.

    Raises:
        OSError: from the constructor and from ``read``.
    """

    def __init__(self, file: Location) -> None:
        self._reader, _ = open_file(file)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._reader.close()

    def read(self, start: int, nbytes: int, buffer: memoryview) -> Bytes:
        """See ``Reader.read``."""
        return np.frombuffer(self._reader.read_into(buffer, start, nbytes), np.uint8)


def open_reader(file: Location) -> Source:
    """Open a file, wherever it lies.

    Raises:
        OSError: it cannot be opened.
    """
    return Reader(str(file.local)) if file.is_local else Remote(file)


class Mapped:
    """Bytes that are at hand, behind the interface of a ``Reader``."""

    def __init__(self, data: Bytes) -> None:
        self._data = data

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing to close."""

    def read(self, start: int, nbytes: int, buffer: memoryview) -> Bytes:
        """See ``Reader.read``; ``buffer`` is not needed."""
        del buffer
        return self._data[start : start + nbytes]


class Source(Protocol):
    """Where ranges are read from: a ``Reader``, or bytes that are ``Mapped``."""

    def __enter__(self) -> Self:
        """See ``Reader``."""
        ...

    def __exit__(self, *_: object) -> None:
        """See ``Reader``."""
        ...

    def read(self, start: int, nbytes: int, buffer: memoryview) -> Bytes:
        """See ``Reader.read``."""
        ...


class Lanes:
    """A few threads that work on items in order, each with two buffers of ``block`` bytes."""

    def __init__(self, block: int) -> None:
        self.block = block
        self._pool = ThreadPoolExecutor(LANES, thread_name_prefix="verify")
        self._buffers: queue.SimpleQueue[Buffers] = queue.SimpleQueue()
        for _ in range(LANES):
            self._buffers.put((new_buffer(block), new_buffer(block)))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def map(
        self, work: Callable[[_Item, Buffers], _Result], items: Iterable[_Item]
    ) -> Iterator[_Result]:
        """``work(item, buffers)`` for each item, in order.

        What ``work`` returns must not be a view into its buffers: the next item overwrites them.
        """
        return self._pool.map(lambda item: self._with_buffers(work, item), items)

    def _with_buffers(self, work: Callable[[_Item, Buffers], _Result], item: _Item) -> _Result:
        buffers = self._buffers.get()
        try:
            return work(item, buffers)
        finally:
            self._buffers.put(buffers)


def new_buffer(nbytes: int) -> memoryview:
    """For reads of up to ``nbytes``, page-aligned; its pages cost nothing until they are used."""
    return memoryview(mmap.mmap(-1, nbytes + 2 * PAGE))

"""Local files, read and written past the page cache.

A merge touches every byte once, so the page cache only costs a copy and throws out what other
programs use: reads and writes of big ranges go through O_DIRECT where the file system has it,
and through an ordinary descriptor where it has not (macOS, tmpfs, some network file systems).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from merge_core.errors import AbsentError, RaymeldError, StorageError, replaced
from merge_core.layout import ALIGNMENT

SLACK = 2 * ALIGNMENT
"""What a read buffer needs beyond the range: tensors start at 8-byte offsets, so a direct read
widens to the page before and the page after."""

DIRECT_MIN_BYTES = 256 << 10
"""Below this a direct read costs a whole device round trip where readahead has it at hand."""

_DIRECT = getattr(os, "O_DIRECT", 0)
_REFUSALS = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP}
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT}
_ABSENT = {errno.ENOENT, errno.ENOTDIR, errno.ESTALE}


@contextlib.contextmanager
def reported(path: object) -> Iterator[None]:
    """Turn an OSError raised inside into a StorageError that names the file and the way out."""
    try:
        yield
    except RaymeldError:
        raise
    except OSError as error:
        remedy = "Check that the path exists and may be read and written."
        if error.errno in _NO_SPACE:
            remedy = "Free space there, or choose another --out."
        kind = AbsentError if error.errno in _ABSENT else StorageError
        raise kind(error.strerror or str(error), str(path), remedy) from error


class RangeReader:
    """Reads byte ranges of one file. Threads may share it, each with its own buffer."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._refused = False
        with reported(path):
            self._buffered = os.open(path, os.O_RDONLY)
            self._direct = _open_direct(path, os.O_RDONLY)

    def read_into(self, buffer: memoryview, offset: int, nbytes: int) -> memoryview:
        """The ``nbytes`` at ``offset``, as a view inside ``buffer``.

        Args:
            buffer: page aligned, of at least ``nbytes + SLACK`` bytes.

        Raises:
            StorageError: the read failed, or the file ends before the range does.
        """
        with reported(self._path):
            if self._direct >= 0 and not self._refused and nbytes >= DIRECT_MIN_BYTES:
                start = offset // ALIGNMENT * ALIGNMENT
                lead = offset - start
                try:
                    self._fill(self._direct, buffer, start, lead + nbytes, round_up(lead + nbytes))
                except OSError as error:
                    if error.errno not in _REFUSALS:
                        raise
                    self._refused = True  # opens but cannot read directly: some FUSE file systems
                else:
                    return buffer[lead : lead + nbytes]
            self._fill(self._buffered, buffer, offset, nbytes, nbytes)
            return buffer[:nbytes]

    def read(self, offset: int, nbytes: int) -> memoryview:
        """The ``nbytes`` at ``offset`` in memory of their own, through the page cache.

        For small things that several workers of a machine read, such as LoRA factors.
        """
        buffer = own_memory(nbytes)
        with reported(self._path):
            self._fill(self._buffered, buffer, offset, nbytes, nbytes)
        return buffer

    def _fill(
        self, descriptor: int, buffer: memoryview, offset: int, needed: int, asked: int
    ) -> None:
        got = 0
        while got < needed:
            step = os.preadv(descriptor, [buffer[got:asked]], offset + got)
            if step == 0:
                raise replaced(self._path)
            got += step

    def close(self) -> None:
        """Close both descriptors."""
        os.close(self._buffered)
        if self._direct >= 0:
            os.close(self._direct)


class PartFile:
    """A file of known size, written at any offsets by any threads, then made durable.

    The space is allocated first, so that a full disk is an error before the work and not after.
    Whole pages go past the page cache; what does not start or end on a page goes through an
    ordinary descriptor. The two never touch the same page: big tensors start on a page, and
    everything after an odd end is odd itself (see ``layout.lay_out``).
    """

    def __init__(self, path: Path, size: int) -> None:
        """Create ``path``, which must not exist, with ``size`` bytes allocated."""
        self._path = path
        self._direct = -1
        self._refused = False
        with reported(path):
            self._buffered = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            with reported(path):
                _allocate(self._buffered, size)
                self._direct = _open_direct(path, os.O_WRONLY)
        except StorageError:
            self.discard()
            raise

    def write(self, data: memoryview, offset: int) -> None:
        """Write ``data`` at ``offset``.

        ``data`` must start on a page in memory where ``offset`` does in the file.
        """
        whole = len(data) // ALIGNMENT * ALIGNMENT
        with reported(self._path):
            if self._direct >= 0 and not self._refused and offset % ALIGNMENT == 0 and whole:
                try:
                    _write_all(lambda: self._direct, data[:whole], offset)
                except OSError as error:
                    if error.errno not in _REFUSALS:
                        raise
                    self._refused = True
                else:
                    data, offset = data[whole:], offset + whole
            _write_all(lambda: self._buffered, data, offset)

    def write_small(self, data: bytes, offset: int) -> None:
        """Write ``data``, which may lie anywhere in memory, through the page cache."""
        with reported(self._path):
            _write_all(lambda: self._buffered, memoryview(data), offset)

    def finish(self) -> str:
        """Make the content durable and close; returns the file's name, which is made durable by who
        renames it.
        """
        with reported(self._path):
            os.fsync(self._buffered)
        self._close()
        return self._path.name

    def discard(self) -> None:
        """Close and remove the file."""
        self._close()
        _remove_if_possible(self._path)

    def _close(self) -> None:
        # Numbers are used again: a lane that nobody waited for would write to another file.
        buffered, direct = self._buffered, self._direct
        self._buffered = self._direct = -1
        os.close(buffered)
        if direct >= 0:
            os.close(direct)


def own_memory(nbytes: int) -> memoryview:
    """Memory for something that is read and kept for a while.

    Much of it is from the system itself: malloc would keep what is freed, in each thread's arena.
    """
    large = nbytes >= DIRECT_MIN_BYTES
    return memoryview(mmap.mmap(-1, nbytes) if large else bytearray(nbytes))


def write_durably(path: Path, data: bytes, *, durable: bool = True) -> None:
    """Replace ``path`` with ``data``: after a crash it holds the old content or all of the new.

    Args:
        durable: False: after a crash of the machine it may hold anything.
    """
    with _replacing(path, durable=durable) as descriptor, reported(path):
        _write_all(lambda: descriptor, memoryview(data), 0)


def create_durably(path: Path, data: bytes) -> bool:
    """Write ``path`` unless it exists; whether it did not."""
    with reported(path):
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            return False
        try:
            _write_all(lambda: descriptor, memoryview(data), 0)
            os.fsync(descriptor)
        except OSError:  # a full disk: half a file would look like somebody else's
            _remove_if_possible(path)
            raise
        finally:
            os.close(descriptor)
    return True


def make_directory(path: Path) -> None:
    """Make ``path`` and what is missing above it, so that a crash does not lose them."""
    if path.is_dir():
        return
    make_directory(path.parent)
    with reported(path):
        path.mkdir(exist_ok=True)
    sync_directory(path.parent)


@contextlib.contextmanager
def _replacing(path: Path, *, durable: bool) -> Iterator[int]:
    """A descriptor whose content becomes that of ``path`` if nothing is raised inside."""
    temporary = path.with_name(f".{path.name}.tmp")
    with reported(path):
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        yield descriptor
        with reported(path):
            if durable:
                os.fsync(descriptor)
            os.rename(temporary, path)
    except BaseException:
        _remove_if_possible(temporary)
        raise
    finally:
        os.close(descriptor)
    if durable:
        sync_directory(path.parent)


def _remove_if_possible(path: Path) -> None:
    """What has failed is told; that a broken disk keeps the remains as well is not."""
    with contextlib.suppress(OSError):
        path.unlink()


def sync_directory(directory: Path) -> None:
    """Make the names in ``directory`` durable."""
    with reported(directory):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def round_up(value: int) -> int:
    """The next multiple of the page size."""
    return -(-value // ALIGNMENT) * ALIGNMENT


def _write_all(descriptor: Callable[[], int], data: memoryview, offset: int) -> None:
    done = 0
    while done < len(data):  # who closes a part does not wait for its writes
        done += os.pwrite(descriptor(), data[done:], offset + done)


def _open_direct(path: Path, flags: int) -> int:
    if not _DIRECT:
        return -1  # no direct access here
    try:
        return os.open(path, flags | _DIRECT)
    except OSError as error:
        if error.errno in _REFUSALS:
            return -1
        raise


def _allocate(descriptor: int, size: int) -> None:
    """Reserve ``size`` bytes on disk; only set the length where the file system cannot reserve.

    Through fallocate(2) itself: posix_fallocate falls back to touching every page, which takes
    minutes on a network file system.
    """
    os.ftruncate(descriptor, size)
    fallocate = getattr(ctypes.CDLL(None, use_errno=True), "fallocate", None)
    if fallocate is None or size == 0:
        return
    fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    if fallocate(descriptor, 0, 0, size) != 0:
        code = ctypes.get_errno()
        if code not in _REFUSALS | {errno.ENOSYS}:
            raise OSError(code, os.strerror(code))

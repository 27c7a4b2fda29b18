"""Files of a node that lie there until they are sent, within bounds that all its workers share.

A directory holds no list of its files: each is allocated whole and locked while somebody needs it,
so their sizes are what is taken, and what is not locked belongs to a process that died.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from merge_core.errors import StorageError, counted, refuse, some_of
from merge_core.storage import PartFile, reported
from merge_core.stores.inodes import file_system_of
from merge_core.stores.location import Upload

LOOK_SECONDS = 0.5
"""Between two looks whether others have left room; a shard takes seconds at least."""

WAITS = "waits for "
"""So begins what is said of a wait."""

TRY_SECONDS = 0.05
"""Between two tries to get the lock."""

TOLD_SECONDS = 5.0
"""That others may hold the lock before it is said: they look, allocate a file, and let go."""

_IN_MEMORY = frozenset({"tmpfs", "ramfs"})
_SUFFIX = ".raymeld-part"
_LOCK = ".raymeld-lock"


class ScratchPart(PartFile):
    """See ``store.PartWriter``: a finished one still has to be sent, and to be discarded then."""

    def __init__(self, path: Path, size: int) -> None:
        self.path = path
        self._lock: int | None = None
        self._finished = False
        super().__init__(path, size)
        with reported(path):
            self._lock = os.open(path, os.O_RDWR)  # NFS gives no exclusive lock to who only reads
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def finish(self) -> str:
        """See ``store.PartWriter``; returns the path."""
        super().finish()
        self._finished = True
        return str(self.path)

    def discard(self) -> None:
        """Remove the file, finished or not; more than once is harmless."""
        if not self._finished:
            super().discard()
            self._finished = True
        with contextlib.suppress(OSError):
            self.path.unlink()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


class Scratch:
    """A directory of this node.

    Args:
        folder: None: one of this user's where temporary files belong.
        limit: bytes that may lie there at a time; None: all that is free.
        say: told once in each wait what for, in words that follow a worker's name.
    """

    def __init__(
        self, folder: str | None, limit: int | None, say: Callable[[str], None] | None = None
    ) -> None:
        self._say = say or _unheard
        own = Path(tempfile.gettempdir()) / f"raymeld-parts-{os.getuid()}"
        self.folder, self._is_own = (own, True) if folder is None else (Path(folder), False)
        self._limit = limit

    def start(self, name: str, size: int) -> ScratchPart:
        """A file of ``size`` bytes, once there is room for it: others' are waited for.

        Args:
            name: unique.

        Raises:
            StorageError: the disk or the limit is too small for it alone, or nothing can be
                written there.
        """
        waits = False
        while True:
            with self._locked():
                held = self._held()
                if self._has_room(size, sum(held.values())):
                    return ScratchPart(self.folder / f"{name}.{os.getpid()}{_SUFFIX}", size)
            if not waits:
                whose = f"{counted(len(held), 'file')} of {_holders(held)}"
                self._say(f"{WAITS}room in {self.folder}, which holds {whose}")
                waits = True
            time.sleep(LOOK_SECONDS)

    def sweep(self) -> None:
        """Remove the files of processes that died, if there are any that may be removed. Whoever
        has the lock does so himself.
        """
        if self.folder.is_dir():
            with contextlib.suppress(StorageError), self._locked(wait=False):
                self._held()

    def try_out(self) -> None:
        """Make sure that files can be written there, and leave nothing of that.

        Raises:
            InputError: they cannot.
        """
        try:
            with reported(self.folder), _explained(self.folder):
                if self._is_own and os.path.lexists(self.folder):
                    self._refuse_foreign()
                for path in (self.folder / _LOCK, *self.folder.glob(f"*{_SUFFIX}")):
                    with contextlib.suppress(FileNotFoundError):
                        path.open("r+b").close()
                with tempfile.TemporaryFile(dir=nearest(self.folder)):
                    pass
        except StorageError as error:
            remedy = "Give --scratch a directory that this user may write to"
            raise refuse(error.what, f"--scratch {self.folder}", remedy) from error

    @property
    def room(self) -> int:
        """Bytes that the disk has for it, once what waits there now is sent."""
        with reported(self.folder):
            free = shutil.disk_usage(nearest(self.folder)).free
            return free + sum(path.stat().st_size for path in self.folder.glob(f"*{_SUFFIX}"))

    @property
    def in_memory(self) -> str:
        """What to say where files take memory, as far as this machine tells; else empty."""
        with reported(self.folder):
            kind = file_system_of(nearest(self.folder).stat())
        return f"{self.folder} is memory, not a disk ({kind})" if kind in _IN_MEMORY else ""

    def _has_room(self, size: int, held: int) -> bool:
        """Whether it has, or will not have by itself: then allocating says so."""
        free = shutil.disk_usage(self.folder).free
        if self._limit is not None and held + size > self._limit:
            if not held:
                what = f"{size} bytes are more than --scratch-limit allows ({self._limit})"
                raise StorageError(what, str(self.folder), "Allow more")
            return False
        if free < size and not held:
            what = f"no space: a shard takes {size / 1e9:.2f} GB, {free / 1e9:.2f} GB are free"
            remedy = "Free space there, give another --scratch, or a smaller --shard-size"
            raise StorageError(what, str(self.folder), remedy)
        return free >= size

    def _held(self) -> dict[Path, int]:
        """Files that are needed, and their bytes; removes the others."""
        held = {}
        for path in self.folder.glob(f"*{_SUFFIX}"):
            with contextlib.suppress(FileNotFoundError), path.open("r+b") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    held[path] = os.fstat(file.fileno()).st_size
                else:
                    path.unlink()
        return held

    @contextlib.contextmanager
    def _locked(self, *, wait: bool = True) -> Iterator[None]:
        """Nobody else looks or begins a file here while inside.

        Raises:
            StorageError: it cannot be; or somebody has the lock, and ``wait`` is False.
        """
        with reported(self.folder), _explained(self.folder):
            if self._is_own:
                self.folder.mkdir(mode=0o700, exist_ok=True)
                self._refuse_foreign()
            else:
                self.folder.mkdir(parents=True, exist_ok=True)
            with (self.folder / _LOCK).open("a+b", buffering=0) as lock:
                if not _try(lock):
                    if not wait:
                        raise BlockingIOError
                    self._wait_for(lock)
                with contextlib.suppress(OSError):  # a full disk
                    lock.truncate(0)
                    lock.write(b"%d" % os.getpid())
                yield

    def _wait_for(self, lock: BinaryIO) -> None:
        """Until nobody else has it, which is said if that takes long."""
        end = time.monotonic() + TOLD_SECONDS
        while time.monotonic() < end:
            time.sleep(TRY_SECONDS)
            if _try(lock):
                return
        lock.seek(0)
        self._say(f"{WAITS}{self.folder / _LOCK}, which {_process(lock.read(20))} holds")
        fcntl.flock(lock, fcntl.LOCK_EX)

    def _refuse_foreign(self) -> None:
        """Anybody may have made it where everybody may write."""
        if self.folder.is_symlink() or self.folder.lstat().st_uid != os.getuid():
            raise StorageError("belongs to somebody else", str(self.folder), "Give --scratch")


def scratch_of(upload: Upload, say: Callable[[str], None] | None = None) -> Scratch:
    """Where what goes to the hub waits, see ``Scratch``."""
    return Scratch(upload.scratch, upload.scratch_limit, say)


@contextlib.contextmanager
def _explained(folder: Path) -> Iterator[None]:
    """Say whose it is that may not be written: a scratch belongs to one user."""
    try:
        yield
    except PermissionError as error:
        found = nearest(Path(error.filename or folder))
        what = f"{found} belongs to {_owner(found)}, and may not be written to"
        raise StorageError(what, f"--scratch {folder}", "Give one of your own") from error


def nearest(path: Path) -> Path:
    """What exists of a path and the folders above it."""
    return next(one for one in (path, *path.parents) if os.path.lexists(one))


def _owner(path: Path) -> str:
    try:
        return f"user {path.owner()}"
    except (KeyError, OSError):
        return "another user"


def _try(lock: BinaryIO) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _process(number: bytes) -> str:
    """Whose number it is, as far as this machine numbers processes."""
    return f"process {number.decode()}" if number.isdigit() else "another process"


def _holders(held: Iterable[Path]) -> str:
    """Whose the files are: each bears the number of its process."""
    numbers = (path.name.removesuffix(_SUFFIX).rpartition(".")[2] for path in held)
    return some_of(sorted({_process(number.encode()) for number in numbers}))


def _unheard(line: str) -> None:
    """What ``say`` is when nobody listens."""

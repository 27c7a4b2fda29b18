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
from collections.abc import Iterator
from pathlib import Path

from merge_core.errors import StorageError
from merge_core.storage import PartFile, make_directory, reported

LOOK_SECONDS = 0.5
"""Between two looks whether others have left room; a shard takes seconds at least."""

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
    """

    def __init__(self, folder: str | None, limit: int | None) -> None:
        own = Path(tempfile.gettempdir()) / f"raymeld-parts-{os.getuid()}"
        self._folder, self._is_own = (own, True) if folder is None else (Path(folder), False)
        self._limit = limit

    def start(self, name: str, size: int) -> ScratchPart:
        """A file of ``size`` bytes, once there is room for it: others' are waited for.

        Args:
            name: unique.

        Raises:
            StorageError: the disk or the limit is too small for it alone, or nothing can be
                written there.
        """
        while True:
            with self._locked():
                held = self._held()
                if self._has_room(size, held):
                    return ScratchPart(self._folder / (name + _SUFFIX), size)
            time.sleep(LOOK_SECONDS)

    def sweep(self) -> None:
        """Remove the files of processes that died, if there are any that may be removed."""
        if self._folder.is_dir():
            with contextlib.suppress(StorageError), self._locked():
                self._held()

    def _has_room(self, size: int, held: int) -> bool:
        """Whether it has, or will not have by itself: then allocating says so."""
        free = shutil.disk_usage(self._folder).free
        if self._limit is not None and held + size > self._limit:
            if not held:
                what = f"{size} bytes are more than --scratch-limit allows ({self._limit})"
                raise StorageError(what, str(self._folder), "Allow more")
            return False
        if free < size and not held:
            what = f"no space: a shard takes {size / 1e9:.2f} GB, {free / 1e9:.2f} GB are free"
            remedy = "Free space there, give another --scratch, or a smaller --shard-size"
            raise StorageError(what, str(self._folder), remedy)
        return free >= size

    def _held(self) -> int:
        """Bytes of files that are needed; removes the others."""
        held = 0
        for path in self._folder.glob(f"*{_SUFFIX}"):
            with contextlib.suppress(FileNotFoundError), path.open("r+b") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    held += os.fstat(file.fileno()).st_size
                else:
                    path.unlink()
        return held

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Nobody else looks or begins a file here while inside."""
        with reported(self._folder):
            if self._is_own:
                self._folder.mkdir(mode=0o700, exist_ok=True)
                self._refuse_foreign()
            else:
                make_directory(self._folder)
            with (self._folder / _LOCK).open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                yield

    def _refuse_foreign(self) -> None:
        """Anybody may have made it where everybody may write."""
        if self._folder.is_symlink() or self._folder.lstat().st_uid != os.getuid():
            raise StorageError("belongs to somebody else", str(self._folder), "Give --scratch")

"""A directory as a store: read and written past the page cache, published by renaming."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

from merge_core.errors import AbsentError, StorageError, replaced
from merge_core.storage import (
    PartFile,
    RangeReader,
    create_durably,
    make_directory,
    reported,
    sync_directory,
    write_durably,
)
from merge_core.stores.inodes import inode_of
from merge_core.stores.location import Location
from merge_core.stores.store import PARTS, FileIdentity, Listed


class LocalStore:
    """See ``store.Store``."""

    def __init__(self, location: Location) -> None:
        self.location = location
        self._path = location.local

    def look(self, name: str) -> FileIdentity:
        """See ``Store``."""
        path = self._path / name
        with reported(path):
            if path.exists() and not path.is_file():
                raise StorageError("is no file", str(path), "Put the file itself there.")
            status = os.stat(path)
            if not os.access(path, os.R_OK):
                raise StorageError("may not be read", str(path), "Ask its owner for permission.")
        pin, inode = str(status.st_mtime_ns), inode_of(status)
        return FileIdentity(name=name, size=status.st_size, pin=pin, inode=inode)

    def list(self, below: str = "") -> Iterator[Listed]:
        """See ``Store``. A folder that may not be looked into stands for what lies in it, and a
        link that leads nowhere is there.
        """
        waiting = [below]
        while waiting:
            folder = waiting.pop(0)
            try:
                entries = sorted(os.scandir(self._path / folder), key=lambda entry: entry.name)
            except (FileNotFoundError, NotADirectoryError):
                continue
            except OSError:
                if folder == below:
                    with reported(self._path / folder):
                        raise
                yield Listed(name=folder, size=0, modified=0.0)
                continue
            for entry in entries:
                name = f"{folder}/{entry.name}" if folder else entry.name
                if entry.is_dir():
                    if not entry.is_symlink():
                        waiting.append(name)
                    continue
                with contextlib.suppress(FileNotFoundError):
                    status = entry.stat(follow_symlinks=not _leads_nowhere(entry))
                    yield Listed(name=name, size=status.st_size, modified=status.st_mtime)

    def get(self, name: str) -> bytes:
        """See ``Store``."""
        with reported(self._path / name):
            return (self._path / name).read_bytes()

    def open(self, file: FileIdentity) -> RangeReader:
        """See ``Store``."""
        if not file.is_still(self.look(file.name)):
            raise replaced(str(self._path / file.name))
        return RangeReader(self._path / file.name)

    def put(self, name: str, data: bytes, *, durable: bool = True) -> None:
        """See ``Store``."""
        make_directory((self._path / name).parent)
        write_durably(self._path / name, data, durable=durable)

    def create(self, name: str, data: bytes) -> bool:
        """See ``Store``."""
        make_directory((self._path / name).parent)
        return create_durably(self._path / name, data)

    def start(self, name: str, size: int, attempt: str) -> LocalPart:
        """See ``Store``."""
        part = f"{name}.{attempt}.part"
        make_directory(self._path / PARTS)
        return LocalPart(self._path / PARTS / part, size)

    def publish(self, part: str, name: str, size: int) -> None:
        """See ``Store``."""
        source, target = self._path / PARTS / Path(part).name, self._path / name
        with reported(target):
            if source.exists():
                _refuse_size(source, size)
                os.rename(source, target)
                sync_directory(target.parent)
                return
        if not target.exists():
            raise AbsentError("is gone", str(source), "The same command again makes it anew.")
        _refuse_size(target, size)

    def sweep(self, name: str | None = None) -> None:
        """See ``Store``."""
        with reported(self._path / PARTS):
            for part in (self._path / PARTS).glob("*.part"):
                if name is None or part.name.startswith(f"{name}."):
                    part.unlink(missing_ok=True)
        if name is None:
            self._prune(self._path / PARTS)

    def delete(self, name: str) -> None:
        """See ``Store``. No empty folder is left either: other stores have none."""
        path = self._path / name
        with reported(path):
            path.unlink(missing_ok=True)
        self._prune(path.parent)

    def clock(self) -> float:
        """See ``Store``. A server of network files tells its own only by a write."""
        return time.time()

    def _prune(self, folder: Path) -> None:
        with contextlib.suppress(OSError):  # the first that is not empty
            while folder != self._path:
                folder.rmdir()
                folder = folder.parent


class LocalPart(PartFile):
    """See ``store.PartWriter``."""


def _leads_nowhere(entry: os.DirEntry[str]) -> bool:
    return entry.is_symlink() and not os.path.exists(entry.path)


def _refuse_size(path: Path, size: int) -> None:
    found = path.stat().st_size
    if found != size:
        what = f"is not as planned: it has {found} bytes, not {size}"
        raise StorageError(what, str(path), "The same command again makes it anew.")

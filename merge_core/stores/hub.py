"""Models on the Hugging Face hub, read where they lie: from the cache, else by ranges.

A location means a commit from the moment when it is first looked at, and every pin names it: a
branch that moves on during a merge changes nothing.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import NoReturn

from merge_core.errors import StorageError
from merge_core.storage import RangeReader, reported
from merge_core.stores.hub_errors import HubPlace, absent
from merge_core.stores.hub_files import (
    HubEntry,
    HubTree,
    cached_file,
    fetch,
    pin,
    read_tree,
)
from merge_core.stores.hub_ranges import HubReader
from merge_core.stores.location import Location
from merge_core.stores.retries import PATIENT, Retries
from merge_core.stores.store import FileIdentity, Listed, Reader

_MAIN = "main"


class HubStore:
    """A folder of a model, to read from; nothing can be written.

    Args:
        location: its revision is a branch, a tag or a commit; None: the main branch.
    """

    def __init__(self, location: Location, *, retries: Retries = PATIENT) -> None:
        self._location, self._retries = location, retries

    def __repr__(self) -> str:
        return f"HubStore({str(self._location)!r})"

    @property
    def location(self) -> Location:
        """Of the folder, as it was given."""
        return self._location

    @property
    def pinned(self) -> Location:
        """The same at the commit that it means: who opens that sees the same files."""
        return dataclasses.replace(self._location, revision=self._pin[0].revision)

    def look(self, name: str) -> FileIdentity:
        """Identity of a file; its pin names the commit, and what it holds."""
        path = self._path(name)
        entry = self._tree.files.get(path)
        if entry is None:
            raise absent(self._tree.place.at(path))
        return FileIdentity(
            name=name, size=entry.size, pin=f"{self._tree.place.revision} {entry.oid}".rstrip()
        )

    def list(self, below: str = "") -> Iterator[Listed]:
        """The files below ``below``, in folders in there too; when offline, those cached."""
        folder = self._path(below)
        for path, entry in self._tree.files.items():
            if not folder or path.startswith(f"{folder}/"):
                name = path.removeprefix(f"{self._location.path}/")
                yield Listed(name=name, size=entry.size, modified=self._tree.modified)

    def get(self, name: str) -> bytes:
        """All of a small file, which is checked against what the hub says of it."""
        file = self.look(name)
        place, entry = self._pinned(file)
        path = self.fetch(file) if self._location.access.cache else cached_file(place)
        if path is not None:
            with reported(path):
                return path.read_bytes()
        for _ in range(self._retries.attempts):
            data = bytes(HubReader(place, entry, self._retries).read(0, entry.size))
            if entry.holds(data):
                return data
        raise StorageError("what the hub sends is damaged", str(place), "Try again later")

    def open(self, file: FileIdentity) -> Reader:
        """Open the file that was pinned, at the commit that its pin names."""
        place, entry = self._pinned(file)
        path = cached_file(place)
        return HubReader(place, entry, self._retries) if path is None else _Cached(path, file)

    def fetch(self, file: FileIdentity) -> Path:
        """Have the whole file that was pinned in the cache, where it is opened from then on."""
        place, entry = self._pinned(file)
        return fetch(place, entry)

    @cached_property
    def _pin(self) -> tuple[HubPlace, float]:
        """The commit, and when the model last changed."""
        given = HubPlace(repo=self._location.root, revision=self._location.revision or _MAIN)
        return pin(given, self._retries)

    @cached_property
    def _tree(self) -> HubTree:
        place, modified = self._pin
        return read_tree(place, self._location.path, modified, self._retries)

    def _path(self, name: str) -> str:
        return "/".join(part for part in (self._location.path, name) if part)

    def _pinned(self, file: FileIdentity) -> tuple[HubPlace, HubEntry]:
        """What a pin says, which may come from another machine's look."""
        commit, _, oid = file.pin.partition(" ")
        place = HubPlace(repo=self._location.root, revision=commit, path=self._path(file.name))
        return place, HubEntry(size=file.size, oid=oid)

    def _refuse(self, *_: object, **__: object) -> NoReturn:
        what = "a model on the hub is written in one commit, not file by file"
        remedy = "Merge onto it with --state; as --out of anything else, give that state"
        raise StorageError(what, str(self._location), remedy)

    def clock(self) -> float:
        """See ``store.Store``: nothing here is as young as a commit."""
        return time.time()

    put = create = start = publish = sweep = delete = _refuse


def sha256_of(file: FileIdentity) -> str | None:
    """What the hub says of the content, in hexadecimal; None: the file is in git, not in LFS."""
    kind, _, digest = file.pin.partition(" ")[2].partition(":")
    return digest if kind == "sha256" else None


class _Cached:
    """A file of the cache, through the reader of local files."""

    def __init__(self, path: Path, file: FileIdentity) -> None:
        with reported(path):
            size = path.stat().st_size
        if size != file.size:
            what = f"has not the {file.size} bytes that the hub has"
            remedy = "Remove it from the cache, and fetch it again"
            raise StorageError(what, str(path), remedy)
        self._reader = RangeReader(path)

    def read_into(self, buffer: memoryview, offset: int, nbytes: int) -> memoryview:
        return self._reader.read_into(buffer, offset, nbytes)

    def read(self, offset: int, nbytes: int) -> memoryview:
        return self._reader.read(offset, nbytes)

    def close(self) -> None:
        self._reader.close()

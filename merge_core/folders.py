"""A folder that is read: which files lie in it, and what the small ones say."""

from __future__ import annotations

import os
from typing import Any

from merge_core.errors import InputError, StorageError, refuse
from merge_core.json_text import parse_object
from merge_core.stores import opening
from merge_core.stores.location import Location
from merge_core.stores.opening import open_store, read_file
from merge_core.stores.store import FileIdentity


def pinned(folder: Location) -> Location:
    """See ``stores.opening.pinned``.

    Raises:
        InputError: there is no such model, or it cannot be looked at.
    """
    try:
        return opening.pinned(folder)
    except StorageError as error:
        raise refused(error) from error


def names_in(folder: Location, role: str, holds: str) -> frozenset[str]:
    """The files in ``folder`` and below it, links that lead nowhere among them.

    Args:
        role: what the folder is to the merge, such as BASE.
        holds: the file that makes it one.

    Raises:
        InputError: there is no such folder, or it may not be looked into.
    """
    if folder.is_local:
        _refuse_other_paths(folder, role, holds)
    try:
        names = frozenset(listed.name for listed in open_store(folder).list())
    except StorageError as error:
        raise refused(error) from error
    if not names and not folder.is_local:
        remedy = f"Check its name; it is the folder that holds {holds}"
        raise refuse(f"{role} does not exist: nothing lies there", str(folder), remedy)
    return names


def _refuse_other_paths(folder: Location, role: str, holds: str) -> None:
    where = str(folder)
    if not os.path.isdir(where):
        noun = "a checkpoint" if role == "BASE" else "an adapter"
        there = os.path.exists(where)
        kind = f"is a file, not {noun} directory" if there else "does not exist"
        raise refuse(f"{role} {kind}", where, f"Give the directory that holds {holds}")
    if not os.access(where, os.R_OK | os.X_OK):
        raise refuse(f"{role} may not be read", where, "Ask its owner for permission")


def read_json(file: Location) -> dict[str, Any]:
    """The JSON object in ``file``.

    Raises:
        InputError: there is none, or it is no JSON object.
    """
    try:
        if file.is_local:
            open_store(file.parent).look(file.name)  # to read from a pipe would wait
        data = read_file(file)
    except StorageError as error:
        what = f"cannot be read ({error.what})"
        raise refuse(what, str(file), "Check the path and its permissions") from None
    return parse_object(data, str(file), "Fetch the file again")


class SmallFiles:
    """The small files of a folder, each of them read once.

    Raises:
        StorageError: it cannot be looked into; ``read`` and ``look`` as a store does.
    """

    def __init__(self, folder: Location) -> None:
        self.folder = folder
        self._store = open_store(folder)
        self.sizes = {listed.name: listed.size for listed in self._store.list()}
        self._read: dict[str, bytes] = {}

    def look(self, name: str) -> FileIdentity:
        """Identity of a file."""
        return self._store.look(name)

    def read(self, name: str) -> bytes:
        """All of a file."""
        if name not in self._read:
            self._read[name] = self._store.get(name)
        return self._read[name]

    def holds(self, name: str, other: SmallFiles) -> bool:
        """Whether there is a file of that name, with the bytes that it has in ``other``."""
        same = name in self.sizes and self.sizes[name] == other.sizes[name]
        return same and self.read(name) == other.read(name)


def refused(error: StorageError) -> InputError:
    """The same as a problem of the input, which is told with all others."""
    return refuse(error.what, error.where, error.remedy.removesuffix("."))

"""Failures that mean the same whatever the store, in the same words."""

from __future__ import annotations

from merge_core.errors import AbsentError, StorageError, TakenError
from merge_core.stores.location import Location

ATTEMPT = "raymeld-attempt"
"""Metadata of an object: which attempt wrote it. When an answer was lost, it tells whether the
object that is there now is ours."""


def absent(where: Location) -> AbsentError:
    """There is no such file."""
    what = "there is no such object, or no such bucket"
    return AbsentError(what, str(where), "Check the name, and that it was not removed.")


def misplaced(where: Location, asked: str, got: str) -> StorageError:
    """The answer to a read is not what was asked for."""
    what = f"asked for {asked}, the server answers {got}"
    remedy = "Something between here and the store does not pass ranges on: reach it another way."
    return StorageError(what, str(where), remedy)


def incomplete(where: Location, got: int, size: int) -> StorageError:
    """A part has not the size that was planned."""
    return StorageError(f"the part is not as planned: {got} of {size} bytes", str(where))


def gone(where: Location, attempt: str) -> AbsentError:
    """A part was removed, or belongs to another file."""
    what = f"the part of attempt {attempt} is gone, and this file is not of it"
    return AbsentError(what, str(where), "Merge it again.")


def taken(where: Location) -> TakenError:
    """Another writer has given its file that name."""
    what = "there is a file of that name, which another writer made"
    return TakenError(what, str(where), "Choose another --out, or remove it.")

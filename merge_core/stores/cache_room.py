"""Room in huggingface_hub's cache for files that several workers of a machine fetch at a time.

huggingface_hub has a lock for each file, and fetches until the disk is full. So who fetches leaves
a note of what is to come, which is locked while that lasts, and whoever begins counts all of them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import constants

from merge_core.errors import StorageError

_NOTES = Path(".locks") / "raymeld"
"""In the cache, where huggingface_hub looks for no models."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Coming:
    """A file that is fetched into the cache."""

    blob: str
    """Where it will lie."""
    size: int

    @property
    def left(self) -> int:
        """Bytes that are still to come: it may have broken off, or be under way elsewhere."""
        path = Path(self.blob)
        if path.exists():
            return 0
        parts = path.parent.glob(f"{path.name}*.incomplete")
        return max(0, self.size - max(map(_size, parts), default=0))


@contextlib.contextmanager
def room_for(coming: Coming) -> Iterator[None]:
    """Keep room for a file while it is fetched inside.

    Raises:
        StorageError: the disk has none beside what others fetch.
    """
    cache = Path(constants.HF_HUB_CACHE)
    with contextlib.ExitStack() as stack:
        try:
            with _turn(cache / _NOTES):
                _check(cache, coming.left, _left_to_others(cache / _NOTES, coming))
                stack.enter_context(_noted(cache / _NOTES, coming))
        except StorageError:
            raise
        except OSError:  # no locks there, or another user's: then nobody knows of others
            _check(cache, coming.left, 0)
        yield


@contextlib.contextmanager
def _turn(notes: Path) -> Iterator[None]:
    """Nobody else counts or begins while inside."""
    notes.mkdir(parents=True, exist_ok=True)
    with (notes / "turn").open("ab") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _noted(notes: Path, coming: Coming) -> Iterator[None]:
    path = notes / f"{secrets.token_hex(8)}.json"
    with path.open("x") as note:
        try:
            fcntl.flock(note, fcntl.LOCK_EX)
            json.dump(dataclasses.asdict(coming), note)
            note.flush()
            yield
        finally:
            path.unlink(missing_ok=True)


def _left_to_others(notes: Path, mine: Coming) -> int:
    """Bytes that others have still to fetch; a file that several want comes once. Notes of
    processes that died are removed.
    """
    found: set[Coming] = set()
    for path in notes.glob("*.json"):
        with contextlib.suppress(FileNotFoundError), path.open("rb") as note:
            try:
                fcntl.flock(note, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                found.add(Coming(**json.loads(note.read())))
            else:
                path.unlink()
    return sum(one.left for one in found if one.blob != mine.blob)


def _check(cache: Path, left: int, others: int) -> None:
    free = shutil.disk_usage(next(one for one in (cache, *cache.parents) if one.exists())).free
    if free - others >= left:
        return
    what = f"the cache has no room: {left:,} bytes are to come, {free:,} are free"
    what += f", {others:,} of them for what others fetch" if others else ""
    remedy = "Free space there, set HF_HOME to a larger disk, or read ranges: without --cache"
    raise StorageError(what, str(cache), remedy)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # whole in this moment
        return 0

"""Whether a machine reaches the paths of a merge, and whether they are the same places everywhere.

A path is only a name: what one machine has mounted there, another may lack, or have of its own. So
inputs are compared by what lies in them, and OUT by a folder that one machine makes and the
others write into, as driver and workers do in a merge.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass

from merge_core.digest import bytes_digest
from merge_core.errors import AbsentError, InputError, Problem, StorageError, refuse
from merge_core.side_files import CONFIG, INDEX
from merge_core.storage import reported, sync_directory, write_durably
from merge_core.stores.location import Location, Upload, locate
from merge_core.stores.opening import open_store, read_file
from merge_core.stores.scratch import scratch_of
from merge_core.stores.store import FileIdentity

SAMPLE_BYTES = 64 << 10
"""Read at each end of a file: configs as a whole, and of weights the header with some values."""

STALE_SECONDS = 3600.0
"""Age at which a trial belongs to nobody: its doctor was killed. None takes that long."""

_TRIAL = ".raymeld-doctor-"


def refuse_private(*places: Location) -> None:
    """Refuse what no other process sees, before one is asked to read or write it.

    Raises:
        InputError: one of the places lies in the memory of this process.
    """
    for place in places:
        if place.scheme == "memory":
            what, remedy = "lies in the memory of this process alone", "Take a path or a store"
            raise refuse(what, str(place), f"{remedy}, or --address inline")


@dataclass(frozen=True, slots=True, kw_only=True)
class FileSight:
    """One file of an input, as it is seen from somewhere."""

    identity: FileIdentity
    digest: str
    """Over both its ends."""

    @property
    def is_merged(self) -> bool:
        """Whether weights come from it, or what they mean; not a tokenizer, a lock, a README."""
        name = self.identity.name
        ours = name in {CONFIG, INDEX} or name.startswith("adapter_")
        return ours or name.endswith(".safetensors")


@dataclass(frozen=True, slots=True, kw_only=True)
class InputSight:
    """A folder to read from, as it is seen from somewhere."""

    path: Location
    files: tuple[FileSight, ...]
    """Those whose names are not hidden, by name."""
    error: str | None
    """Why it cannot be read, if it cannot."""

    def lacks(self, name: str) -> bool:
        """Whether there is no such file in it."""
        return all(file.identity.name != name for file in self.files)

    def difference(self, driver: InputSight) -> str | None:
        """How what is merged from it differs from what the driver sees under the same path, or
        None.
        """
        mine, theirs = ([f for f in sight.files if f.is_merged] for sight in (self, driver))
        other = _other_content(mine, theirs)
        if other is None and set(mine) != set(theirs):
            return "is a copy with other times, which a merge takes for files that changed"
        return other

    def side_difference(self, driver: InputSight) -> str | None:
        """How the rest of it differs, which only the driver reads, if anybody."""
        mine, theirs = ([f for f in sight.files if not f.is_merged] for sight in (self, driver))
        return _other_content(mine, theirs)


def _other_content(here: Sequence[FileSight], driver: Sequence[FileSight]) -> str | None:
    mine, theirs = ({f.identity.name: _content(f) for f in files} for files in (here, driver))
    missing, more = sorted(theirs.keys() - mine.keys()), sorted(mine.keys() - theirs.keys())
    other = sorted(name for name in mine.keys() & theirs.keys() if mine[name] != theirs[name])
    for names, verb in ((missing, "is missing"), (more, "is there alone"), (other, "differs")):
        if names:
            rest = f" ({len(names)} such files)" * (len(names) > 1)
            return f"holds other files than the driver sees there: {names[0]} {verb}{rest}"
    return None


def look_at_input(path: Location) -> InputSight:
    """List and sample what lies in ``path``; never raises for what it meets there."""
    files = []
    try:
        files = [_look_at_file(path, name) for name in sorted(_plain_files(path))]
    except StorageError as error:
        inside = error.where.rpartition("/")[2] + ": " if error.where != str(path) else ""
        return InputSight(path=path, files=(), error=f"{inside}{error.what}")
    return InputSight(path=path, files=tuple(files), error=None)


def _plain_files(path: Location) -> Iterator[str]:
    if path.is_local:
        with reported(path), os.scandir(path.local) as entries:
            names = [entry.name for entry in entries if entry.is_file()]
    else:
        names = [one.name for one in open_store(path).list() if "/" not in one.name]
        if not names:
            raise AbsentError("nothing lies there", str(path))
    yield from (name for name in names if not name.startswith("."))


@dataclass(frozen=True, slots=True, kw_only=True)
class ScratchSight:
    """What a machine has for the files that wait to be sent to the hub."""

    folder: str
    room: int | None = None
    """Bytes that the disk has for them; None: that cannot be told."""
    memory: str = ""
    """What to say where they take memory; else empty."""
    refusal: Problem | None = None
    """Why nothing can be written there."""


def look_at_scratch(upload: Upload) -> ScratchSight:
    """Look at it as a merge will use it; makes nothing, and never raises for what it meets."""
    scratch = scratch_of(upload)
    folder = str(scratch.folder)
    try:
        scratch.try_out()
        return ScratchSight(folder=folder, room=scratch.room, memory=scratch.in_memory)
    except InputError as error:
        return ScratchSight(folder=folder, refusal=error.problems[0])
    except StorageError as error:
        refusal = Problem(error.what, error.where, error.remedy)
        return ScratchSight(folder=folder, refusal=refusal)


def nearest_directory(out: Location) -> Location:
    """OUT, or what exists of the directories above it; a store has none.

    Raises:
        StorageError: it may not be looked at.
    """
    if not out.is_local:
        return out
    with reported(out):
        path = out.local
        return locate(next(place for place in (path, *path.parents) if place.exists()))


@contextlib.contextmanager
def trial_directory(place: Location) -> Iterator[Location]:
    """A directory in ``place`` to write into while inside; nothing of it is left at the end, if it
    can be removed: whoever wants to know looks.

    Raises:
        StorageError: it cannot be made.
    """
    trial = place / f"{_TRIAL}{secrets.token_hex(8)}"
    _remove_stale(place)
    if place.is_local:
        with reported(place):
            trial.local.mkdir()
            sync_directory(place.local)
    else:  # who may not write there is told now
        open_store(trial).put("driver", b"")
    try:
        yield trial
    finally:
        for _ in range(2):  # a node that answers late may have put a file there meanwhile
            _remove(trial)


def leave_token(trial: Location, name: str) -> str | None:
    """Write a file into a trial as a merge writes its own; why that failed, or None.

    A trial's name is new, so that no client of a network file system remembers that there is no
    such directory: whoever does not find it looks at another place.
    """
    try:
        if trial.is_local:
            write_durably((trial / name).local, name.encode())
        else:
            open_store(trial).put(name, name.encode())
    except StorageError as error:
        seen = not trial.is_local or trial.local.exists()
        return error.what if seen else "what the driver makes there is not seen"
    return None


def token_arrived(trial: Location, name: str) -> bool:
    """Whether a token that was left on another machine is there, whole."""
    try:
        return read_file(trial / name) == name.encode()
    except StorageError:
        return False


def _look_at_file(folder: Location, name: str) -> FileSight:
    store = open_store(folder)
    identity = store.look(name)
    head = min(SAMPLE_BYTES, identity.size)
    tail = max(head, identity.size - SAMPLE_BYTES)
    with closing(store.open(identity)) as reader:
        sample = b"".join(
            reader.read(first, end - first) for first, end in ((0, head), (tail, identity.size))
        )
    return FileSight(identity=identity, digest=bytes_digest(sample))


def _content(file: FileSight) -> tuple[int, str]:
    return file.identity.size, file.digest


def _remove_stale(place: Location) -> None:
    if not place.is_local:
        for listed in open_store(place).list():
            if listed.name.startswith(_TRIAL) and time.time() - listed.modified > STALE_SECONDS:
                open_store(place).delete(listed.name)
        return
    for old in place.local.glob(f"{_TRIAL}*"):
        with contextlib.suppress(FileNotFoundError), reported(place):  # its own doctor was faster
            if time.time() - old.stat().st_mtime > STALE_SECONDS:
                shutil.rmtree(old, ignore_errors=True)  # it may be another user's


def _remove(trial: Location) -> None:
    if trial.is_local:
        shutil.rmtree(trial.local, ignore_errors=True)
        return
    with contextlib.suppress(StorageError):
        for listed in open_store(trial).list():
            open_store(trial).delete(listed.name)

"""Whether a machine reaches the paths of a merge, and whether they are the same places everywhere.

A path is only a name: what one machine has mounted there, another may lack, or have of its own. So
inputs are compared by what lies in them, and OUT by a directory that one machine makes and the
others write into, as driver and workers do in a merge.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from merge_core.digest import bytes_digest
from merge_core.errors import StorageError
from merge_core.side_files import CONFIG, INDEX
from merge_core.storage import FileIdentity, reported, sync_directory, write_durably

SAMPLE_BYTES = 64 << 10
"""Read at each end of a file: configs as a whole, and of weights the header with some values."""

STALE_SECONDS = 3600.0
"""Age at which a trial belongs to nobody: its doctor was killed. None takes that long."""

_TRIAL = ".raymeld-doctor-"


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
    """A directory to read from, as it is seen from somewhere."""

    path: Path
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


def look_at_input(path: Path) -> InputSight:
    """List and sample what lies in ``path``; never raises for what it meets there."""
    files = []
    try:
        with reported(path), os.scandir(path) as entries:
            names = sorted(e.name for e in entries if e.is_file() and not e.name.startswith("."))
        files = [_look_at_file(path, name) for name in names]
    except StorageError as error:
        inside = Path(error.where).name + ": " if Path(error.where) != path else ""
        return InputSight(path=path, files=(), error=f"{inside}{error.what}")
    return InputSight(path=path, files=tuple(files), error=None)


def nearest_directory(out: Path) -> Path:
    """OUT, or what exists of the directories above it.

    Raises:
        StorageError: it may not be looked at.
    """
    with reported(out):
        return next(path for path in (out, *out.parents) if path.exists())


@contextlib.contextmanager
def trial_directory(place: Path) -> Iterator[Path]:
    """A directory in ``place`` to write into while inside; nothing of it is left at the end, if it
    can be removed: whoever wants to know looks.

    Raises:
        StorageError: it cannot be made.
    """
    trial = place / f"{_TRIAL}{secrets.token_hex(8)}"
    with reported(place):
        _remove_stale(place)
        trial.mkdir()
    try:
        sync_directory(place)
        yield trial
    finally:
        for _ in range(2):  # a node that answers late may have put a file there meanwhile
            shutil.rmtree(trial, ignore_errors=True)


def leave_token(trial: Path, name: str) -> str | None:
    """Write a file into a trial as a merge writes its own; why that failed, or None.

    A trial's name is new, so that no client of a network file system remembers that there is no
    such directory: whoever does not find it looks at another place.
    """
    try:
        write_durably(trial / name, name.encode())
    except StorageError as error:
        return error.what if os.path.exists(trial) else "what the driver makes there is not seen"
    return None


def token_arrived(trial: Path, name: str) -> bool:
    """Whether a token that was left on another machine is there, whole."""
    try:
        return (trial / name).read_bytes() == name.encode()
    except OSError:
        return False


def _look_at_file(directory: Path, name: str) -> FileSight:
    path = directory / name
    identity = FileIdentity.of(directory, name)
    with reported(path), path.open("rb") as file:
        head = file.read(SAMPLE_BYTES)
        file.seek(max(len(head), identity.size - SAMPLE_BYTES))
        return FileSight(identity=identity, digest=bytes_digest(head + file.read(SAMPLE_BYTES)))


def _content(file: FileSight) -> tuple[int, str]:
    return file.identity.size, file.digest


def _remove_stale(place: Path) -> None:
    for old in place.glob(f"{_TRIAL}*"):
        with contextlib.suppress(FileNotFoundError):  # its own doctor was faster
            if time.time() - old.stat().st_mtime > STALE_SECONDS:
                shutil.rmtree(old, ignore_errors=True)  # it may be another user's

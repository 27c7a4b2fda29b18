"""The scratch directory of a session, and those that killed processes have left behind."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

PREFIX = "raymeld-"

ALIVE = "alive"
"""A file that its process keeps locked. The kernel drops the lock when that is killed, and tells
the next session so that nobody needs the directory any more."""


@contextlib.contextmanager
def scratch_directory() -> Iterator[Path]:
    """A new directory, gone at the end; also removes those of processes that were killed."""
    parent = _short_temporary_directory()
    _remove_abandoned(Path(parent))
    path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
    try:
        with (path / "new").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            os.rename(path / "new", path / ALIVE)  # unlocked it would look abandoned
            yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _remove_abandoned(parent: Path) -> None:
    for path in parent.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):  # in use, or gone in this moment
            if path.is_symlink() or path.lstat().st_uid != os.getuid():
                continue
            with (path / ALIVE).open() as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)


def _short_temporary_directory() -> str:
    """Where Ray may put its sockets: a socket's path may not exceed 107 bytes."""
    usual = tempfile.gettempdir()
    return usual if len(usual) < 20 or sys.platform == "darwin" else "/tmp"  # noqa: S108

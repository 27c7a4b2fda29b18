"""The lease of a destination: one merge at a time works in OUT, and a crash blocks nobody.

A lease is the highest of a row of numbered files, ``OUT/.raymeld/lease/00000007.json``. Taking it
over and keeping it are the same step: create the next number, which only one can, and see that it
is the highest, since who slept for long may find a number free that others have left behind. So it
needs nothing of the store but "create if absent" and a list of names with their times.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from merge_core.errors import InputError, LeaseLostError, refuse
from merge_core.holder import UNKNOWN, Holder, read_holder, write_holder
from merge_core.storage import reported

LEASE_SECONDS = 45.0
"""Age at which a lease that nobody renewed is free. Long enough for a store that stalls, short
enough for a job that is started again on another machine after its first one died."""

RENEW_SECONDS = 10.0
"""Four renewals may fail before anybody else can take over."""

LOOK_SECONDS = 1.0
"""Between two looks at the lease of somebody who may be gone."""

LISTINGS = 5
"""Of the lease's directory, until its last name can be opened: each renewal removes one name, but
not several in a row, and a link that leads nowhere stays."""

_VANISHED = (errno.ENOENT, errno.ESTALE)
"""What a renewed file answers, on this machine's disks and on NFS."""


class Lease:
    """The lease of one destination, renewed by a thread of its own while it is held.

    Who holds it may have died with its machine. So a lease that nobody renews is waited for: a job
    that is started again at once would otherwise use up its retries.

    Args:
        out: the destination; made if it is missing.
        say: told that the lease is waited for.

    Raises:
        InputError: another merge holds it.
        StorageError: it cannot be written.
    """

    def __init__(self, out: Path, say: Callable[[str], None]) -> None:
        self._out, self._directory, self._say = out, lease_directory(out), say
        self.holder = Holder.this_process()
        self._number = self._take()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep, daemon=True, name="lease")
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()

    def renew(self) -> None:
        """Make it young again.

        Raises:
            LeaseLostError: another merge has taken it.
        """
        if not _advance(self._directory, self._number, self.holder):
            raise taken_over(self._out)
        self._number += 1

    def release(self) -> None:
        """Let the next merge take it at once."""
        self._ended.set()
        self._thread.join()
        with contextlib.suppress(OSError):  # it ends by itself, only later
            try:
                _advance(self._directory, self._number, None)
            except OSError:  # a full disk
                os.utime(_path(self._directory, self._number), (0, 0))

    def _take(self) -> int:
        with reported(self._directory):
            self._directory.mkdir(parents=True, exist_ok=True)
            number = self._await_free()
            if not _advance(self._directory, number, self.holder):
                raise _held(self._out, _newest(self._directory)[1])
        return number + 1

    def _await_free(self) -> int:
        """The number to go on from, once nobody holds the lease."""
        first, holder, age = _latest(self._directory)
        if holder is None or not _is_live(holder, age):
            return first
        if holder.is_alive():
            raise _held(self._out, holder)
        left = LEASE_SECONDS - age
        self._say(f"waiting {left:.0f} s for the lease of {holder} to expire")
        end = time.monotonic() + left
        while time.monotonic() < end:
            time.sleep(LOOK_SECONDS)
            number, holder, _ = _newest(self._directory)
            if holder is None:
                return number
            if number != first or holder.is_alive():
                raise _held(self._out, holder)
        return first

    def _keep(self) -> None:
        while not self._ended.wait(RENEW_SECONDS):
            try:
                self.renew()
            except OSError:
                continue  # a full disk or a store that stalls; the next one may pass
            except LeaseLostError:
                return  # whoever publishes next looks at the lease, and stops there


def lease_directory(out: Path) -> Path:
    """Where the lease of a destination lies."""
    return out / ".raymeld" / "lease"


def holder_of(out: Path) -> Holder | None:
    """Who has the lease of ``out``, old or not; None if nobody."""
    with reported(out):
        directory = lease_directory(out)
        return _newest(directory)[1] if directory.is_dir() else None


def is_held(out: Path, run: str) -> bool:
    """Whether ``run`` has the lease of ``out``, and nobody took it over."""
    holder = holder_of(out)
    return holder is not None and holder.run == run


def live_holder(out: Path) -> Holder | None:
    """Who has it and still renews it."""
    with reported(out):
        directory = lease_directory(out)
        if not directory.is_dir():
            return None
        _, holder, age = _latest(directory)
        return holder if holder is not None and _is_live(holder, age) else None


def taken_over(out: Path) -> LeaseLostError:
    """What a merge ends with that lost its lease."""
    return LeaseLostError(
        "another merge has taken this directory over",
        str(out),
        "Let only one run, and give each its own --out.",
    )


def _held(out: Path, holder: Holder | None) -> InputError:
    """The refusal of a second merge."""
    return refuse(
        f"{holder or 'another merge'} is merging into it",
        str(out),
        "Wait for it (raymeld status shows it) or stop it",
    )


def _is_live(holder: Holder, age: float) -> bool:
    return age < LEASE_SECONDS and holder.is_alive() is not False


def _latest(directory: Path) -> tuple[int, Holder | None, float]:
    """The highest number, its holder, and the seconds since it was written.

    A file from the future counts as new: clocks were set, and only a renewal would tell more.
    """
    number, holder, written = _newest(directory)
    return number, holder, 0.0 if written is None else max(0.0, _now(directory) - written)


def _newest(directory: Path) -> tuple[int, Holder | None, float | None]:
    """The highest number, its holder, and when it was written, if that can be known."""
    number = 0
    for _ in range(LISTINGS):
        path = max(directory.glob("*.json"), key=_number, default=None)
        if path is None:
            return 0, None, None
        number = _number(path)
        try:
            return number, read_holder(path.read_bytes()), _mtime(path)
        except OSError as error:  # renewed in this moment
            if error.errno not in _VANISHED:
                raise
    return number, UNKNOWN, None


def _advance(directory: Path, number: int, holder: Holder | None) -> bool:
    """Put ``holder`` behind ``number``, unless somebody else is there or further."""
    mine = _path(directory, number + 1)
    if not _create(mine, write_holder(holder)):
        return False
    if _newest(directory)[0] != number + 1:
        mine.unlink(missing_ok=True)
        return False
    for path in directory.glob("*.json"):
        if _number(path) <= number:
            path.unlink(missing_ok=True)
    return True


def _create(path: Path, data: bytes) -> bool:
    """Write ``path`` unless it exists."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    except FileExistsError:
        return False
    try:
        os.write(descriptor, data)
        os.fsync(descriptor)
    except OSError:  # a full disk: half a file would look like somebody else's
        path.unlink(missing_ok=True)
        raise
    finally:
        os.close(descriptor)
    return True


def _path(directory: Path, number: int) -> Path:
    return directory / f"{number:08}.json"


def _number(path: Path) -> int:
    return int(path.stem) if path.stem.isdecimal() else 0


def _mtime(path: Path) -> float:
    return path.stat().st_mtime


def _now(directory: Path) -> float:
    """The time by the clock that stamps the files here, which need not be this machine's."""
    probe = directory / f"now-{secrets.token_hex(8)}"
    try:
        probe.touch()
        return _mtime(probe)
    except OSError:  # who only looks may have no right to write
        return time.time()
    finally:
        with contextlib.suppress(OSError):
            probe.unlink()

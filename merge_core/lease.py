"""The lease of a destination: one merge at a time works in OUT, and a crash blocks nobody.

A lease is the highest of a row of numbered files, ``OUT/.raymeld/lease/00000007.json``. Taking it
over and keeping it are the same step: create the next number, which only one can, and see that it
is the highest, since who slept for long may find a number free that others have left behind. So it
needs nothing of the store but "create if absent" and a list of names with their times.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import secrets
import socket
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from merge_core.errors import RaymeldError, StorageError, refuse
from merge_core.storage import reported

LEASE_SECONDS = 45.0
"""Age at which a lease that nobody renewed is free. Long enough for a store that stalls, short
enough for a job that is started again on another machine after its first one died."""

RENEW_SECONDS = 10.0
"""Four renewals may fail before anybody else can take over."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """Who has a lease."""

    run: str
    """Unique to this merge."""
    host: str
    machine: str
    """Tells this start of this machine, and its numbering of processes, from all others."""
    pid: int
    born: float
    """When the process started, in seconds since the epoch: numbers of processes come again."""

    @classmethod
    def this_process(cls) -> Holder:
        """A new run, in this process."""
        import psutil

        return cls(
            run=secrets.token_hex(16),
            host=socket.gethostname(),
            machine=_machine(),
            pid=os.getpid(),
            born=psutil.Process().create_time(),
        )

    def is_gone(self) -> bool:
        """Whether this machine knows that the process has ended."""
        import psutil

        if self.machine != _machine():
            return False
        try:
            return bool(psutil.Process(self.pid).create_time() != self.born)
        except psutil.NoSuchProcess:
            return True


class Lease:
    """The lease of one destination, renewed by a thread of its own while it is held.

    Args:
        out: the destination; made if it is missing.

    Raises:
        InputError: another merge holds it.
        StorageError: it cannot be written.
    """

    def __init__(self, out: Path) -> None:
        self._out, self._directory = out, lease_directory(out)
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
            RaymeldError: another merge has taken it.
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
            number, holder, age = _latest(self._directory)
            if holder is not None and not holder.is_gone() and age < LEASE_SECONDS:
                raise held(self._out, holder, LEASE_SECONDS - age)
            if not _advance(self._directory, number, self.holder):
                raise held(self._out, _latest(self._directory)[1], LEASE_SECONDS)
        return number + 1

    def _keep(self) -> None:
        while not self._ended.wait(RENEW_SECONDS):
            try:
                self.renew()
            except (OSError, StorageError):
                continue  # a full disk or a store that stalls; the next one may pass
            except RaymeldError:
                return  # whoever publishes next looks at the lease, and stops there


def lease_directory(out: Path) -> Path:
    """Where the lease of a destination lies."""
    return out / ".raymeld" / "lease"


def holder_of(out: Path) -> Holder | None:
    """Who has the lease of ``out``, old or not; None if nobody."""
    with reported(out):
        directory = lease_directory(out)
        return _latest(directory)[1] if directory.is_dir() else None


def live_holder(out: Path) -> Holder | None:
    """Who has it and still renews it."""
    with reported(out):
        directory = lease_directory(out)
        if not directory.is_dir():
            return None
        _, holder, age = _latest(directory)
        return holder if holder and age < LEASE_SECONDS and not holder.is_gone() else None


def held(out: Path, holder: Holder | None, seconds: float) -> Exception:
    """The refusal of a second merge."""
    who = f"process {holder.pid} on {holder.host}" if holder else "another merge"
    return refuse(
        f"{who} is merging into it",
        str(out),
        "Wait for it (raymeld status shows it) or stop it; if its machine is gone, try again in"
        f" {seconds:.0f} s",
    )


def taken_over(out: Path) -> RaymeldError:
    """What a merge ends with that lost its lease."""
    return RaymeldError(
        "another merge has taken this directory over",
        str(out),
        "Let only one run, and give each its own --out.",
    )


def _latest(directory: Path) -> tuple[int, Holder | None, float]:
    """The highest number, its holder, and the seconds since it was written."""
    for path in sorted(directory.glob("*.json"), key=_number, reverse=True):
        try:
            return _number(path), _holder(path.read_bytes()), _now(directory) - _mtime(path)
        except FileNotFoundError:
            return _latest(directory)  # renewed in this moment
    return 0, None, 0.0


def _holder(content: bytes) -> Holder | None:
    """None for a lease that was released."""
    if not content:  # being written in this moment, or by somebody who died in it
        return Holder(run="", host="an unknown machine", machine="", pid=0, born=0.0)
    fields = json.loads(content)
    return Holder(**fields) if fields else None


def _advance(directory: Path, number: int, holder: Holder | None) -> bool:
    """Put ``holder`` behind ``number``, unless somebody else is there or further."""
    mine = _path(directory, number + 1)
    content = dataclasses.asdict(holder) if holder else None
    if not _create(mine, json.dumps(content).encode()):
        return False
    if _latest(directory)[0] != number + 1:
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
    return int(path.stem) if path.stem.isdigit() else 0


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


def _machine() -> str:
    """The boot and the process namespace; the host's name where Linux's /proc is missing."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()

"""Who works in a destination: a process, told from all others by machine and start."""

from __future__ import annotations

import dataclasses
import json
import os
import secrets
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Self

_START_TICKS = 19
"""Place of ``starttime`` among the fields of /proc/PID/stat that follow the name, see proc(5)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """Who has a lease."""

    run: str
    """Unique to this merge."""
    host: str
    machine: str
    """Tells this start of this machine, and its numbering of processes, from all others."""
    pid: int
    started: float
    """When the process started, by a clock that nobody sets: numbers of processes come again."""

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}" if self.pid else self.host

    @classmethod
    def this_process(cls) -> Self:
        """A new run, in this process."""
        return cls(
            run=secrets.token_hex(16),
            host=socket.gethostname(),
            machine=_machine(),
            pid=os.getpid(),
            started=_started(os.getpid()) or 0.0,
        )

    def is_alive(self) -> bool | None:
        """Whether the process still runs; None where this machine cannot know."""
        if self.machine != _machine():
            return None
        started = _started(self.pid)
        if started is None:
            return None if _is_there(self.pid) else False
        return started == self.started


UNKNOWN = Holder(run="", host="an unknown machine", machine="", pid=0, started=0.0)
"""Whoever wrote what cannot be read; only time tells whether it is alive."""


def write_holder(holder: Holder | None) -> bytes:
    """The content of a lease file; None releases the lease."""
    return json.dumps(dataclasses.asdict(holder) if holder else None).encode()


def read_holder(content: bytes) -> Holder | None:
    """None for a lease that was released, UNKNOWN for what cannot be read.

    Such a file is being written in this moment, was cut short, lost its bytes with the power, or
    comes from another version. It may not block OUT for ever.
    """
    try:
        fields = json.loads(content)
        return None if fields is None else Holder(**fields)
    except (ValueError, TypeError):
        return UNKNOWN


def _machine() -> str:
    """The boot and the process namespace; the host's name where Linux's /proc is missing."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _started(pid: int) -> float | None:
    """Ticks from the boot to the start of a process; None if it is gone, or somebody else's that
    this machine hides.

    psutil adds the time of the boot, which moves when the clock is set: a process that runs would
    look like another one. It serves where /proc is missing.
    """
    if Path("/proc/self/stat").exists():
        try:
            stat = Path(f"/proc/{pid}/stat").read_bytes()
        except (FileNotFoundError, ProcessLookupError, PermissionError):  # see hidepid in proc(5)
            return None
        return float(stat.rpartition(b")")[2].split()[_START_TICKS])
    import psutil

    try:
        return float(psutil.Process(pid).create_time())
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return None


def _is_there(pid: int) -> bool:
    """Whether a process of that number runs, whoever's it is."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True

"""How much memory the cgroups of this process leave it: containers, Slurm jobs, systemd scopes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

ROOT = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")


@dataclass(frozen=True, slots=True)
class _Files:
    """What the files of one version of cgroups are called."""

    limit: str
    usage: str
    cache: tuple[str, str]
    """In ``memory.stat``: pages of files, which the kernel takes back before it refuses memory.
    Counted as used, a container that has just copied a checkpoint would look full."""


_V2 = _Files("memory.max", "memory.current", ("inactive_file", "active_file"))
_V1 = _Files(
    "memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file")
)


def free_in_cgroups() -> int | None:
    """Bytes up to the tightest limit; None where nothing is limited."""
    free: list[int] = []
    for group, files in _groups():
        with contextlib.suppress(OSError, ValueError):  # no such controller, or "max": no limit
            limit = int((group / files.limit).read_text())
            used = int((group / files.usage).read_text()) - _cache(group, files)
            free.append(max(limit - used, 0))
    return min(free, default=None)


def _groups() -> Iterator[tuple[Path, _Files]]:
    """The groups that this process is in, with all above them, whose limits hold as well."""
    with contextlib.suppress(OSError):
        for line in MEMBERSHIP.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            root, files = (ROOT / "memory", _V1) if controllers else (ROOT, _V2)
            if controllers and "memory" not in controllers.split(","):
                continue
            inside = PurePosixPath(path)
            for group in (inside, *inside.parents):
                yield root / str(group).lstrip("/"), files


def _cache(group: Path, files: _Files) -> int:
    rows = (line.split() for line in (group / "memory.stat").read_text().splitlines())
    return sum(int(value) for name, value in rows if name in files.cache)

"""Leases that look as if time had passed, or as if other machines held them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

from merge_core.lease import LEASE_SECONDS, Lease
from merge_core.output import LEASE
from merge_core.stores.location import locate


def unheard(line: str) -> None:
    """For what nobody wants to hear."""


def take(out: Path, say: Callable[[str], None] = unheard) -> Lease:
    return Lease(locate(out), say)


def lease_directory(out: Path) -> Path:
    return out / LEASE


def newest(out: Path) -> Path:
    return max(lease_directory(out).glob("*.json"))


def age(out: Path, seconds: float) -> None:
    """Make the lease look as if nobody had renewed it for so long."""
    then = newest(out).stat().st_mtime - seconds
    os.utime(newest(out), (then, then))


def move_elsewhere(out: Path) -> None:
    """Make the lease look as if another machine held it."""
    fields = json.loads(newest(out).read_bytes())
    newest(out).write_text(json.dumps({**fields, "machine": "another", "host": "far"}))


def take_over(out: Path) -> Lease:
    """Take the lease of a merge at work, as if it had slept."""
    move_elsewhere(out)
    age(out, LEASE_SECONDS + 1)
    return take(out)

"""How far a merge is: what inline merges and Ray drivers report, and consoles draw."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerProgress:
    """What one worker is doing."""

    worker: str
    device: str
    doing: str
    """The shard's file name, or what it waits for."""
    done: int
    """Bytes of that shard."""
    size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """The state of the whole merge."""

    phase: str
    """``merging`` or ``verifying``."""
    done: int
    """Bytes written (or read back) so far, of all shards."""
    total: int
    workers: tuple[WorkerProgress, ...]

"""What the schedule has the driver do."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """Start a worker."""

    worker: int
    kind: str
    delay: float
    """Seconds to wait first; grows with failures in a row, since a broken environment fails
    within milliseconds and would be tried thousands of times."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Assign:
    """Give an item to a worker."""

    worker: int
    item: int
    attempt: int
    shrink: int = 0
    """How often the item ran out of memory: each time it gets a third of the lanes."""
    then: int | None = None
    """The item that the worker will probably be given next, so that it may prepare for that."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """End a worker, whatever it does; nothing more is heard of it."""

    worker: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Abort:
    """Give up: which item or kind of worker, and why."""

    item: int | None
    reason: str
    cause: Exception | None


Command = Start | Assign | Release | Abort

"""What happens to workers and their work: reported by the pool, read by the schedule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerReady:
    """A worker answered its first call and may be given work."""

    worker: int
    node: str = ""
    """Where it is: what fails there may well fail for its neighbours."""
    host: str = ""
    """What people call that machine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerStartFailed:
    """A worker never came up."""

    worker: int
    reason: str
    cause: Exception | None = None
    """What it raised, if it could."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerUnfit:
    """A worker is up but can do nothing where it is, such as on a GPU that is full."""

    worker: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerLost:
    """A worker died, with whatever it was doing."""

    worker: int
    reason: str
    out_of_memory: bool = False
    """The machine killed it for its memory: that counts against the item, not as bad luck."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ItemDone:
    """A worker finished an item; the driver settles whether the result is accepted."""

    worker: int
    item: int
    result: Any = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ItemFailed:
    """A worker reported an error and is alive."""

    worker: int
    item: int
    error: Exception
    hopeless: bool = False
    """The same would happen again, such as an infinity in a tensor: do not retry."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerDraining:
    """The node of a worker is about to go; told again and again until it has gone."""

    worker: int
    seconds_left: float
    """Infinite where nothing was said."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KindUnavailable:
    """None of the workers of a kind came up for so long that nobody waits for them any more."""

    kind: str
    reason: str
    error: Exception


Event = (
    WorkerReady
    | WorkerStartFailed
    | WorkerUnfit
    | WorkerLost
    | WorkerDraining
    | ItemDone
    | ItemFailed
    | KindUnavailable
)

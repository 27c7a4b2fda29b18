"""A crew: the workers of one kind, what they are at, and how fast they have been."""

from __future__ import annotations

from bisect import insort
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerKind:
    """One kind of worker, such as those with a GPU."""

    name: str
    """``cuda`` or ``cpu``."""
    most: int
    """How many to keep at work at most."""
    ceiling: int
    """How many there could be at once: more than ``most`` where a merge has fewer shards. Instead
    of a worker that is left alone, another one may come up."""
    handicap: float = 1.0
    """How many times longer than on the fastest kind an item is expected to take, until some have
    been timed."""


@dataclass(slots=True)
class Run:
    """An item under way."""

    item: int
    since: float


@dataclass(slots=True)
class Crew:
    """The workers of one kind."""

    kind: WorkerKind
    starting: set[int] = field(default_factory=set)
    idle: set[int] = field(default_factory=set)
    running: dict[int, Run] = field(default_factory=dict)
    draining: set[int] = field(default_factory=set)
    """Of those that run: they get nothing more."""
    left: set[int] = field(default_factory=set)
    """Up, but of no use where they are: kept, so that Ray does not hand out their GPU again."""
    late: set[int] = field(default_factory=set)
    """Of those that run: they take far longer than is usual, and may never be through."""
    failed_starts: int = 0
    """In a row; of those that were started together, as on a node that dies, one counts."""
    closed: str | None = None
    """Why no more workers are started; None while they are."""
    cause: Exception | None = None
    latest: int = -1
    """The last that was started."""
    _counted: int = -1
    """Failures of those that were started up to this one are counted."""
    _paces: dict[int, list[float]] = field(default_factory=dict)

    @property
    def alive(self) -> int:
        """Workers that come or are there, without those that are to leave or to be left alone."""
        return len(self.starting) + len(self.idle) + len(self.running) - len(self.draining)

    @property
    def room(self) -> int:
        """How many more may be started."""
        if self.closed is not None:
            return 0
        return min(self.kind.most, self.kind.ceiling - len(self.left)) - self.alive

    @property
    def hopeless(self) -> bool:
        """Whether nobody of it works, and nobody will."""
        return self.closed is not None and not (self.starting or self.idle or self.running)

    def forget(self, worker: int) -> Run | None:
        """Strike a worker off; what it was at, if anything."""
        for group in (self.starting, self.idle, self.left, self.draining, self.late):
            group.discard(worker)
        return self.running.pop(worker, None)

    @property
    def hands(self) -> int:
        """How many of it will take something soon."""
        return len(self.idle) + len(self.running.keys() - self.draining - self.late)

    def start_failed(self, worker: int) -> bool:
        """Note that a worker did not come up; whether that counts as one more in a row."""
        if worker <= self._counted:
            return False
        self._counted = self.latest
        self.failed_starts += 1
        return True

    def close(self, reason: str, cause: Exception | None = None) -> None:
        """Start no more workers; those that work go on."""
        self.closed, self.cause = reason, cause

    def timed(self, rank: int, cost: int, seconds: float) -> None:
        """Take note of how long an item took."""
        insort(self._paces.setdefault(rank, []), seconds / cost)

    def paces(self, rank: int) -> Sequence[float]:
        """Seconds a byte of every item of this rank that was timed, the fastest first."""
        return self._paces.get(rank, ())

    def pace(self, rank: int) -> float | None:
        """The median of them; None while there is none."""
        paces = self.paces(rank)
        return paces[len(paces) // 2] if paces else None

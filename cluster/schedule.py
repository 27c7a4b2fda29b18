"""Who does what next: a state machine of events in and commands out.

No Ray and no clock in here, so that every order of failures can be tried in a test. Work is a set
of items with sizes; the largest waiting item goes to the first worker that is free.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from actors.events import (
    Event,
    ItemDone,
    ItemFailed,
    WorkerDraining,
    WorkerLost,
    WorkerReady,
    WorkerStartFailed,
)

MAX_ERRORS = 3
"""Attempts of an item that may end in an error of ours or out of memory. A third failure on
another worker is no accident."""

MAX_LOSSES = 20
"""Workers that may be lost under one item: spot machines come and go, but an item that kills
every machine it meets must end."""

MAX_START_FAILURES = 3
"""Workers in a row that may fail to start before the pool counts as broken."""


HAND_BACK_SECONDS = 5.0
"""Before its node goes a worker gives back what it has not finished: the end is then known at once,
where a node that vanishes is missed only a quarter of a minute later."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """Start a worker."""

    worker: int
    delay: float
    """Seconds to wait first; grows with failures in a row, since a broken environment fails
    within milliseconds and would be tried thousands of times."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Assign:
    """Give an item to a worker."""

    worker: int
    item: int
    attempt: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """End a worker, whatever it does; nothing more is heard of it."""

    worker: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Abort:
    """Give up: which item or pool, and why."""

    item: int | None
    reason: str
    cause: Exception | None


Command = Start | Assign | Release | Abort


@dataclass(slots=True)
class _Item:
    size: int
    attempts: int = 0
    errors: int = 0
    losses: int = 0
    avoid: int | None = None
    """The worker that it last failed on: another one gets it, if there is another."""


@dataclass(slots=True)
class Schedule:
    """The state of a run; ``handle`` is the only way to change it.

    Args:
        sizes: of each item, by its number.
        most_workers: how many workers to keep alive at most.
        name_of: what an item is called in the log.
    """

    sizes: Mapping[int, int]
    most_workers: int
    name_of: Callable[[int], str] = "item {}".format
    log: list[str] = field(default_factory=list)
    """Every automatic decision, with its reason."""
    _items: dict[int, _Item] = field(init=False)
    _waiting: list[int] = field(init=False)
    _starting: set[int] = field(default_factory=set)
    _idle: set[int] = field(default_factory=set)
    _running: dict[int, int] = field(default_factory=dict)
    _draining: set[int] = field(default_factory=set)
    """Of those that run: they get nothing more."""
    _failed_starts: int = 0
    _aborted: bool = False
    _numbers: itertools.count[int] = field(default_factory=itertools.count)

    def __post_init__(self) -> None:
        self._items = {}
        self._waiting = []
        self.extend(self.sizes)

    def extend(self, sizes: Mapping[int, int]) -> None:
        """Add items; their numbers must be new."""
        self._items |= {number: _Item(size=size) for number, size in sizes.items()}
        self._waiting += sizes
        self._sort()

    @property
    def finished(self) -> bool:
        """Whether every item is done."""
        return not self._waiting and not self._running

    def begin(self) -> list[Command]:
        """The commands that set the run going."""
        return self._next_commands()

    def handle(self, event: Event) -> list[Command]:
        """Take note of ``event`` and say what to do now."""
        if self._aborted:
            return []
        commands: list[Command] = []
        match event:
            case WorkerReady(worker=worker) if worker in self._starting:
                self._starting.discard(worker)
                self._idle.add(worker)
                self._failed_starts = 0
            case WorkerStartFailed(worker=worker, reason=reason) if worker in self._starting:
                self._starting.discard(worker)
                commands += self._start_failed(reason)
            case WorkerLost():
                commands += self._lost(event)
            case WorkerDraining():
                commands += self._drains(event)
            case ItemDone(worker=worker, item=item) if self._running.get(worker) == item:
                commands += self._free(worker)
            case ItemFailed(worker=worker, item=item) if self._running.get(worker) == item:
                commands += self._free(worker)
                commands += self._failed(event)
            case _:
                pass  # about a worker or an attempt that was given up: it came too late
        if any(isinstance(command, Abort) for command in commands):
            self._aborted = True
            return commands
        return commands + self._next_commands()

    def _free(self, worker: int) -> list[Command]:
        del self._running[worker]
        if worker in self._draining:  # its node waits for nothing else
            self._draining.discard(worker)
            return [Release(worker=worker)]
        self._idle.add(worker)
        return []

    def _drains(self, event: WorkerDraining) -> list[Command]:
        """Let it finish what it can in the time that is left, and nothing more."""
        worker = event.worker
        if worker in self._starting | self._idle:
            self._starting.discard(worker)
            self._idle.discard(worker)
            self.log.append(f"worker-{worker} is let go: its node is going")
            return [Release(worker=worker)]
        if worker not in self._running:
            return []
        name = self.name_of(self._running[worker])
        if event.seconds_left <= HAND_BACK_SECONDS:
            self._draining.discard(worker)
            self._wait_again(self._running.pop(worker))
            self.log.append(f"worker-{worker} gives back {name}: its node is going")
            return [Release(worker=worker)]
        if worker not in self._draining:
            self._draining.add(worker)
            self.log.append(f"worker-{worker} gets nothing after {name}: its node is going")
        return []

    def _wait_again(self, number: int) -> None:
        self._waiting.append(number)
        self._sort()

    def _start_failed(self, reason: str) -> list[Command]:
        self._failed_starts += 1
        if self._failed_starts >= MAX_START_FAILURES:
            what = f"{self._failed_starts} workers in a row failed to start: {reason}"
            return [Abort(item=None, reason=what, cause=None)]
        self.log.append(
            f"starting another worker; {self._failed_starts} failed of at most"
            f" {MAX_START_FAILURES} in a row: {reason}"
        )
        return []

    def _lost(self, event: WorkerLost) -> list[Command]:
        self._idle.discard(event.worker)
        if event.worker in self._starting:
            self._starting.discard(event.worker)
            return self._start_failed(event.reason)
        number = self._running.pop(event.worker, None)
        if number is None:
            return []
        item = self._items[number]
        if event.worker in self._draining:  # foretold, and so no sign that the item is to blame
            self._draining.discard(event.worker)
            self._wait_again(number)
            self.log.append(f"worker-{event.worker} is gone with {self.name_of(number)}")
            return []
        if event.out_of_memory:
            item.errors += 1
            return self._retry(number, event.worker, item.errors, MAX_ERRORS, event.reason, None)
        item.losses += 1
        return self._retry(number, event.worker, item.losses, MAX_LOSSES, event.reason, None)

    def _failed(self, event: ItemFailed) -> list[Command]:
        item = self._items[event.item]
        item.errors += 1
        if event.hopeless:
            return [Abort(item=event.item, reason=str(event.error), cause=event.error)]
        reason = str(event.error)
        return self._retry(event.item, event.worker, item.errors, MAX_ERRORS, reason, event.error)

    def _retry(
        self,
        number: int,
        worker: int,
        count: int,
        budget: int,
        reason: str,
        cause: Exception | None,
    ) -> list[Command]:
        if count >= budget:
            what = f"failed {count} times, the last time: {reason}"
            return [Abort(item=number, reason=what, cause=cause)]
        self._items[number].avoid = worker
        self._wait_again(number)
        self.log.append(
            f"retrying {self.name_of(number)} after failure {count} of {budget},"
            f" on worker-{worker}: {reason}"
        )
        return []

    def _next_commands(self) -> list[Command]:
        return [*self._assignments(), *self._starts()]

    def _assignments(self) -> list[Command]:
        commands: list[Command] = []
        for worker in sorted(self._idle):
            number = self._pick(worker)
            if number is None:
                continue
            self._idle.discard(worker)
            self._waiting.remove(number)
            self._running[worker] = number
            self._items[number].attempts += 1
            attempt = self._items[number].attempts
            commands.append(Assign(worker=worker, item=number, attempt=attempt))
        return commands

    def _pick(self, worker: int) -> int | None:
        """The largest waiting item that did not just fail here, unless there is nobody else."""
        alone = len(self._idle) + len(self._running) == 1
        return next((n for n in self._waiting if alone or self._items[n].avoid != worker), None)

    def _starts(self) -> list[Command]:
        staying = len(self._running) - len(self._draining)
        alive = len(self._starting) + len(self._idle) + staying
        spare = len(self._starting) + len(self._idle)
        wanted = min(self.most_workers - alive, len(self._waiting) - spare)
        delay = 2.0**self._failed_starts - 1
        commands: list[Command] = []
        for _ in range(wanted):
            worker = next(self._numbers)
            self._starting.add(worker)
            commands.append(Start(worker=worker, delay=delay))
        return commands

    def _sort(self) -> None:
        self._waiting.sort(key=lambda n: (-self._items[n].size, n))

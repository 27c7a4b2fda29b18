"""A pool without Ray, for tests of the schedule: what could happen, and whether it was handled."""

from __future__ import annotations

import math
from collections.abc import Mapping
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
from cluster.schedule import HAND_BACK_SECONDS, Abort, Assign, Command, Release, Schedule, Start


@dataclass
class Rehearsal:
    """A pool without Ray: carries out commands, checks each of them, and says what may happen."""

    sizes: Mapping[int, int]
    most: int
    schedule: Schedule = field(init=False)
    starting: set[int] = field(default_factory=set)
    idle: set[int] = field(default_factory=set)
    running: dict[int, int] = field(default_factory=dict)
    draining: set[int] = field(default_factory=set)
    gone: set[int] = field(default_factory=set)
    done: list[int] = field(default_factory=list)
    failed_on: dict[int, int] = field(default_factory=dict)
    """The worker that each item failed on last."""
    attempts: dict[int, int] = field(default_factory=dict)
    errors: dict[int, int] = field(default_factory=dict)
    losses: dict[int, int] = field(default_factory=dict)
    failed_starts: int = 0
    abort: Abort | None = None
    past: list[Event] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.schedule = Schedule(sizes=self.sizes, most_workers=self.most)
        self.obey(self.schedule.begin())

    @property
    def over(self) -> bool:
        return self.abort is not None or self.schedule.finished

    @property
    def waiting(self) -> set[int]:
        return set(self.sizes) - set(self.done) - set(self.running.values())

    def tell(self, event: Event) -> None:
        """Something happened: note it as the pool would, then let the schedule decide."""
        self._note(event)
        self.past.append(event)
        self.obey(self.schedule.handle(event))

    def tell_again(self, event: Event) -> None:
        """A late or repeated message changes nothing."""
        assert self.schedule.handle(event) == []

    def is_stale(self, event: Event) -> bool:
        """Whether the event can only be about something that is over."""
        if isinstance(event, ItemDone | ItemFailed):
            return self.running.get(event.worker) != event.item
        return event.worker in self.gone or not isinstance(event, WorkerLost)

    def obey(self, commands: list[Command]) -> None:
        for command in commands:
            match command:
                case Start():
                    self._start(command)
                case Assign():
                    self._assign(command)
                case Release(worker=worker):
                    assert worker in self.draining, "released for no reason"
                    self._leave(worker)
                case Abort():
                    assert command is commands[-1]
                    self.abort = command
        if not self.over:
            assert self.starting | self.running.keys(), "nobody works, and nobody will"
        staying = self.starting | self.idle | self.running.keys() - self.draining
        assert len(staying) <= self.most

    def _note(self, event: Event) -> None:
        match event:
            case WorkerReady(worker=worker):
                self.starting.remove(worker)
                self.idle.add(worker)
                self.failed_starts = 0
            case WorkerStartFailed(worker=worker):
                self._lose(worker)
            case WorkerLost(worker=worker, out_of_memory=memory):
                item = self.running.get(worker)
                if item is not None and worker not in self.draining:
                    counts = self.errors if memory else self.losses
                    counts[item] = counts.get(item, 0) + 1
                    self.failed_on[item] = worker
                self._lose(worker)
            case WorkerDraining(worker=worker):
                self.draining.add(worker)
            case ItemDone(worker=worker, item=item):
                del self.running[worker]
                self.idle.add(worker)
                self.done.append(item)
            case ItemFailed(worker=worker, item=item):
                del self.running[worker]
                self.idle.add(worker)
                self.errors[item] = self.errors.get(item, 0) + 1
                self.failed_on[item] = worker

    def _lose(self, worker: int) -> None:
        self.failed_starts += worker in self.starting
        self._leave(worker)

    def _leave(self, worker: int) -> None:
        self.starting.discard(worker)
        self.idle.discard(worker)
        self.running.pop(worker, None)
        self.gone.add(worker)

    def _start(self, command: Start) -> None:
        known = self.starting | self.idle | self.running.keys() | self.gone
        assert command.worker not in known
        assert command.delay == 2**self.failed_starts - 1
        self.starting.add(command.worker)

    def _assign(self, command: Assign) -> None:
        worker, item = command.worker, command.item
        assert worker not in self.draining, "assigned to a worker whose node is going"
        assert worker in self.idle, "assigned to a worker that is not free"
        assert item in self.waiting, "assigned an item that is done or under way"
        alive = len(self.idle) + len(self.running)
        assert self.failed_on.get(item) != worker or alive == 1
        larger = {n for n in self.waiting if self.sizes[n] > self.sizes[item]}
        assert all(self.failed_on.get(n) == worker for n in larger), "a larger one waits"
        self.attempts[item] = self.attempts.get(item, 0) + 1
        assert command.attempt == self.attempts[item]
        self.idle.remove(worker)
        self.running[worker] = item


def possible(pool: Rehearsal, bad: bool) -> list[Event]:
    """What could happen next, in an order that does not depend on hashes."""
    events: list[Event] = [WorkerReady(worker=w) for w in sorted(pool.starting)]
    events += [ItemDone(worker=w, item=n) for w, n in sorted(pool.running.items())]
    if not bad:
        return events
    events += [WorkerStartFailed(worker=w, reason="no") for w in sorted(pool.starting)]
    for worker in sorted(pool.starting | pool.idle | pool.running.keys()):
        events.append(WorkerLost(worker=worker, reason="gone"))
        events.append(WorkerLost(worker=worker, reason="killed", out_of_memory=True))
        events.append(WorkerDraining(worker=worker, seconds_left=math.inf))
        events.append(WorkerDraining(worker=worker, seconds_left=HAND_BACK_SECONDS))
    for worker, item in sorted(pool.running.items()):
        error = RuntimeError(f"item {item} broke")
        events.append(ItemFailed(worker=worker, item=item, error=error))
        events.append(ItemFailed(worker=worker, item=item, error=error, hopeless=True))
    return events

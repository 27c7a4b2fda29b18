"""A pool without Ray, for tests of the schedule: what could happen, and whether it was handled."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from actors.events import (
    Event,
    ItemDone,
    ItemFailed,
    KindUnavailable,
    WorkerDraining,
    WorkerLost,
    WorkerReady,
    WorkerStartFailed,
    WorkerUnfit,
)
from cluster.backlog import Item
from cluster.commands import Abort, Assign, Command, Release, Start
from cluster.crew import WorkerKind
from cluster.policies import HAND_BACK_SECONDS
from cluster.schedule import Schedule
from merge_core.errors import RaymeldError

FAST, SLOW = "cuda", "cpu"


@dataclass
class Rehearsal:
    """A pool without Ray: carries out commands, checks each of them, and says what may happen."""

    sizes: Mapping[int, int]
    most: int
    slow: int = 0
    """Workers of a second, slower kind."""
    pinned: Mapping[int, str] = field(default_factory=dict)
    """Items that one kind alone may do."""
    holds: bool = False
    read_ahead: bool = False
    schedule: Schedule = field(init=False)
    kind_of: dict[int, str] = field(default_factory=dict)
    starting: set[int] = field(default_factory=set)
    idle: set[int] = field(default_factory=set)
    running: dict[int, int] = field(default_factory=dict)
    draining: set[int] = field(default_factory=set)
    left: set[int] = field(default_factory=set)
    """Up, but of no use."""
    gone: set[int] = field(default_factory=set)
    done: list[int] = field(default_factory=list)
    failed_on: dict[int, int] = field(default_factory=dict)
    """The worker that each item failed on last."""
    attempts: dict[int, int] = field(default_factory=dict)
    errors: dict[int, int] = field(default_factory=dict)
    losses: dict[int, int] = field(default_factory=dict)
    failed_starts: Counter[str] = field(default_factory=Counter)
    latest: dict[str, int] = field(default_factory=dict)
    """The last worker of each kind that was started."""
    counted: dict[str, int] = field(default_factory=dict)
    """Failures of workers up to this one are counted: those of one round are one."""
    closed: set[str] = field(default_factory=set)
    next: dict[int, int] = field(default_factory=dict)
    """What a worker was told that it will be given after its item."""
    abort: Abort | None = None
    past: list[Event] = field(default_factory=list)
    now: float = 0.0

    def __post_init__(self) -> None:
        kinds = [WorkerKind(name=FAST, most=self.most, ceiling=self.most)]
        if self.slow:
            kinds.append(WorkerKind(name=SLOW, most=self.slow, ceiling=self.slow, handicap=4.0))
        self.schedule = Schedule(kinds)
        self.schedule.holds = self.holds
        self.schedule.extend(
            {
                n: Item(size=size, device=self.pinned.get(n), read_ahead=self.read_ahead)
                for n, size in self.sizes.items()
            }
        )
        self.pass_time(0)

    @property
    def over(self) -> bool:
        return self.abort is not None or self.schedule.finished

    @property
    def waiting(self) -> set[int]:
        return set(self.sizes) - set(self.done) - set(self.running.values())

    def suits(self, worker: int, item: int) -> bool:
        return self.pinned.get(item) in (None, self.kind_of[worker])

    def tell(self, event: Event, after: float = 1.0) -> None:
        """Something happened: note it as the pool would, then let the schedule decide."""
        self.now += after
        self._note(event)
        self.past.append(event)
        self.obey(self.schedule.handle(event, self.now))

    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        self.obey(self.schedule.look(self.now))

    def tell_again(self, event: Event) -> None:
        """A late or repeated message changes nothing."""
        assert self.schedule.handle(event, self.now) == []

    def is_stale(self, event: Event) -> bool:
        """Whether the event can only be about something that is over."""
        if isinstance(event, KindUnavailable):
            return False
        if isinstance(event, ItemDone | ItemFailed):
            return self.running.get(event.worker) != event.item
        return event.worker in self.gone or not isinstance(event, WorkerLost | WorkerDraining)

    def obey(self, commands: list[Command]) -> None:
        for command in commands:
            match command:
                case Start():
                    self._start(command)
                case Assign():
                    self._assign(command)
                case Release(worker=worker):
                    self._release(worker)
                case Abort():
                    assert command is commands[-1]
                    self.abort = command
        if not self.over:
            assert self.starting | self.running.keys(), "nobody works, and nobody will"
        staying = self.starting | self.idle | self.running.keys() - self.draining
        alive = Counter(self.kind_of[worker] for worker in staying)
        assert alive[FAST] <= self.most
        assert alive[SLOW] <= self.slow
        if not self.holds and self.abort is None and self.schedule.finished:
            assert not self.starting | self.idle | self.left, "their nodes could leave"

    def _note(self, event: Event) -> None:
        match event:
            case WorkerReady(worker=worker):
                self.starting.remove(worker)
                self.idle.add(worker)
                self.failed_starts[self.kind_of[worker]] = 0
            case WorkerStartFailed(worker=worker):
                self._lose(worker)
            case WorkerUnfit(worker=worker):
                self.starting.remove(worker)
                self.left.add(worker)
            case WorkerLost(worker=worker, out_of_memory=memory):
                item = self.running.get(worker)
                if item is not None and worker not in self.draining:
                    counts = self.errors if memory else self.losses
                    counts[item] = counts.get(item, 0) + 1
                    self.failed_on[item] = worker
                self._lose(worker)
            case WorkerDraining(worker=worker):
                self.draining.add(worker)
                self.next.pop(worker, None)
            case ItemDone(worker=worker, item=item):
                del self.running[worker]
                self.idle.add(worker)
                self.done.append(item)
            case ItemFailed(worker=worker, item=item):
                del self.running[worker]
                self.idle.add(worker)
                self.errors[item] = self.errors.get(item, 0) + 1
                self.failed_on[item] = worker
            case KindUnavailable(kind=kind):
                self.closed.add(kind)

    def _lose(self, worker: int) -> None:
        kind = self.kind_of[worker]
        if worker in self.starting and worker > self.counted.get(kind, -1):
            self.failed_starts[kind] += 1
            self.counted[kind] = self.latest[kind]
        self._leave(worker)

    def _leave(self, worker: int) -> None:
        for group in (self.starting, self.idle, self.left):
            group.discard(worker)
        self.running.pop(worker, None)
        self.next.pop(worker, None)
        self.gone.add(worker)

    def _release(self, worker: int) -> None:
        foretold = worker in self.draining
        second = self.running.get(worker) in self.done
        given_up = self.kind_of[worker] in self.closed and worker in self.starting | self.left
        mine = [n for n in self.waiting if self.suits(worker, n)]
        others = [w for w in self.starting if self.kind_of[w] == self.kind_of[worker]]
        surplus = worker in self.starting and len(others) > len(mine)
        unwanted = not self.holds and (surplus or worker in self.idle | self.left)
        assert foretold or second or given_up or unwanted, "released for no reason"
        self._leave(worker)

    def _start(self, command: Start) -> None:
        worker = command.worker
        assert worker not in self.kind_of
        self.kind_of[worker] = command.kind
        self.latest[command.kind] = worker
        assert command.kind not in self.closed
        assert command.delay == 2 ** self.failed_starts[command.kind] - 1
        self.starting.add(worker)

    def _assign(self, command: Assign) -> None:
        worker, item = command.worker, command.item
        assert worker not in self.draining, "assigned to a worker whose node is going"
        assert worker in self.idle, "assigned to a worker that is not free"
        assert item not in self.done, "assigned an item that is done"
        assert self.suits(worker, item), "assigned to a worker of another kind"
        held = [w for w, n in self.running.items() if n == item]
        assert len(held) <= 1, "assigned a third time at once"
        alive = len(self.idle) + len(self.running)
        if not self.slow and not held:
            assert self.failed_on.get(item) != worker or alive == 1
        self.next.pop(worker, None)
        kept = set(self.next.values())
        larger = {n for n in self.waiting - kept if self.sizes[n] > self.sizes[item]}
        if not self.slow:
            assert all(self.failed_on.get(n) == worker for n in larger), "a larger one waits"
        self.next = {w: n for w, n in self.next.items() if n != item}
        self.attempts[item] = self.attempts.get(item, 0) + 1
        assert command.attempt == self.attempts[item]
        self.idle.remove(worker)
        self.running[worker] = item
        if command.then is not None:
            assert command.then in self.waiting - kept, "told of what others do next"
            assert self.suits(worker, command.then), "told of what it may not do"
            assert command.then not in self.failed_on
            self.next[worker] = command.then


def possible(pool: Rehearsal, bad: bool) -> list[Event]:
    """What could happen next, in an order that does not depend on hashes."""
    events: list[Event] = [WorkerReady(worker=w) for w in sorted(pool.starting)]
    events += [ItemDone(worker=w, item=n) for w, n in sorted(pool.running.items())]
    if not bad:
        return events
    for worker in sorted(pool.starting):
        events.append(WorkerStartFailed(worker=worker, reason="no"))
        events.append(WorkerUnfit(worker=worker, reason="full"))
    for worker in sorted(pool.starting | pool.idle | pool.left | pool.running.keys()):
        events.append(WorkerLost(worker=worker, reason="gone"))
        events.append(WorkerLost(worker=worker, reason="killed", out_of_memory=True))
        events.append(WorkerDraining(worker=worker, seconds_left=math.inf))
        events.append(WorkerDraining(worker=worker, seconds_left=HAND_BACK_SECONDS))
    for worker, item in sorted(pool.running.items()):
        error = RuntimeError(f"item {item} broke")
        events.append(ItemFailed(worker=worker, item=item, error=error))
        events.append(ItemFailed(worker=worker, item=item, error=error, hopeless=True))
    for kind in sorted({pool.kind_of[worker] for worker in pool.starting}):
        events.append(gave_up(kind))
    return events


def gave_up(kind: str) -> KindUnavailable:
    """Nobody of this kind came up for too long."""
    return KindUnavailable(kind=kind, reason="none came", error=RaymeldError(f"no {kind}"))

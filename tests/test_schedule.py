"""The schedule: whatever happens to workers, every item is done once or the end has a name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.events import (
    Event,
    ItemDone,
    ItemFailed,
    WorkerLost,
    WorkerReady,
    WorkerStartFailed,
)
from cluster.schedule import (
    MAX_ERRORS,
    MAX_LOSSES,
    MAX_START_FAILURES,
    Abort,
    Assign,
    Command,
    Schedule,
    Start,
)

SIZES = {0: 10, 1: 30, 2: 20}


@dataclass
class Rehearsal:
    """A pool without Ray: carries out commands, checks each of them, and says what may happen."""

    sizes: Mapping[int, int]
    most: int
    schedule: Schedule = field(init=False)
    starting: set[int] = field(default_factory=set)
    idle: set[int] = field(default_factory=set)
    running: dict[int, int] = field(default_factory=dict)
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
                case Abort():
                    assert command is commands[-1]
                    self.abort = command
        if not self.over:
            assert self.starting | self.running.keys(), "nobody works, and nobody will"
        assert len(self.starting) + len(self.idle) + len(self.running) <= self.most

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
                if item is not None:
                    counts = self.errors if memory else self.losses
                    counts[item] = counts.get(item, 0) + 1
                    self.failed_on[item] = worker
                self._lose(worker)
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
    for worker, item in sorted(pool.running.items()):
        error = RuntimeError(f"item {item} broke")
        events.append(ItemFailed(worker=worker, item=item, error=error))
        events.append(ItemFailed(worker=worker, item=item, error=error, hopeless=True))
    return events


def check_end(pool: Rehearsal) -> None:
    """Everything is done once, or the abort says which item or that the pool is broken, and why."""
    if pool.abort is None:
        assert sorted(pool.done) == sorted(pool.sizes)
        return
    item, reason = pool.abort.item, pool.abort.reason
    last = pool.past[-1]
    if item is None:
        assert pool.failed_starts >= MAX_START_FAILURES
        assert reason.startswith(f"{MAX_START_FAILURES} workers in a row failed to start: ")
        assert pool.schedule.handle(last) == []
        return
    hopeless = isinstance(last, ItemFailed) and last.hopeless
    exhausted = pool.errors.get(item, 0) >= MAX_ERRORS or pool.losses.get(item, 0) >= MAX_LOSSES
    assert hopeless or exhausted
    if isinstance(last, ItemFailed):
        assert pool.abort.cause is last.error
        assert str(last.error) in reason
    assert all(count <= MAX_ERRORS for count in pool.errors.values())
    assert all(count <= MAX_LOSSES for count in pool.losses.values())


@given(st.data())
@settings(max_examples=300)
def test_any_sequence_of_events_ends_with_every_item_done_once_or_a_named_abort(
    data: st.DataObject,
) -> None:
    sizes = data.draw(st.dictionaries(st.integers(0, 30), st.integers(0, 5), max_size=7))
    pool = Rehearsal(sizes, data.draw(st.integers(1, 4)))
    for _ in range(data.draw(st.integers(0, 40))):
        if pool.over:
            break
        stale = [event for event in pool.past if pool.is_stale(event)]
        if stale and data.draw(st.booleans()):
            pool.tell_again(data.draw(st.sampled_from(stale)))
        pool.tell(data.draw(st.sampled_from(possible(pool, bad=data.draw(st.booleans())))))
    for _ in range(3 * len(sizes) + 5):  # from here on all goes well
        if pool.over:
            break
        pool.tell(possible(pool, bad=False)[-1])

    assert pool.over
    check_end(pool)
    for event in pool.past:
        if pool.is_stale(event) or pool.abort:
            pool.tell_again(event)


@given(st.permutations(range(6)), st.integers(1, 3))
def test_largest_items_go_first_whatever_their_numbers(order: list[int], most: int) -> None:
    pool = Rehearsal({n: 10 * place for place, n in enumerate(order)}, most)
    begun: list[int] = []
    while not pool.over:
        pool.tell(possible(pool, bad=False)[0])
        begun += [n for n in pool.running.values() if n not in begun]

    assert begun == list(reversed(order))


def ready(most: int, sizes: Mapping[int, int] = SIZES) -> Rehearsal:
    """A pool whose workers are all up."""
    pool = Rehearsal(sizes, most)
    for worker in sorted(pool.starting):
        pool.tell(WorkerReady(worker=worker))
    return pool


def fail(pool: Rehearsal, worker: int, **fields: Any) -> None:
    item = pool.running[worker]
    pool.tell(ItemFailed(worker=worker, item=item, error=RuntimeError("bad"), **fields))


def test_no_more_workers_are_started_than_there_are_items() -> None:
    assert Rehearsal(SIZES, 9).starting == {0, 1, 2}
    assert Rehearsal({}, 9).starting == set()
    assert Rehearsal({}, 9).schedule.finished


def test_a_failed_item_goes_to_another_worker_and_the_log_says_why() -> None:
    pool = ready(2)
    assert pool.running == {0: 1, 1: 2}

    fail(pool, 0)

    assert pool.running == {0: 0, 1: 2}  # the smaller item, for want of the one that failed here
    assert pool.schedule.log == ["retrying item 1, failure 1 of 3: bad"]
    pool.tell(ItemDone(worker=1, item=2))
    assert pool.running == {0: 0, 1: 1}


def test_a_lonely_worker_gets_its_failed_item_again() -> None:
    pool = ready(1)

    fail(pool, 0)

    assert pool.running == {0: 1}
    assert pool.attempts == {1: 2}


def test_the_third_error_of_an_item_ends_the_run_with_its_cause() -> None:
    pool = ready(2)
    while pool.abort is None:
        fail(pool, next(worker for worker, item in pool.running.items() if item == 1))
        other = next((w for w, n in pool.running.items() if n != 1 and 1 in pool.waiting), None)
        if pool.abort is None and other is not None:
            pool.tell(ItemDone(worker=other, item=pool.running[other]))

    assert (pool.errors, pool.abort.item) == ({1: MAX_ERRORS}, 1)
    assert pool.abort.reason == "failed 3 times, the last time: bad"
    assert str(pool.abort.cause) == "bad"


def test_a_hopeless_error_ends_the_run_at_once() -> None:
    pool = ready(2)

    fail(pool, 1, hopeless=True)

    assert pool.abort is not None
    assert (pool.abort.item, pool.abort.reason) == (2, "bad")


@pytest.mark.parametrize(("memory", "budget"), [(False, MAX_LOSSES), (True, MAX_ERRORS)])
def test_lost_workers_are_replaced_until_their_item_has_cost_too_many(
    memory: bool, budget: int
) -> None:
    pool = ready(1)
    for number in range(budget):
        assert pool.running == {number: 1}
        pool.tell(WorkerLost(worker=number, reason="node gone", out_of_memory=memory))
        if pool.abort is None:
            assert pool.starting == {number + 1}
            pool.tell(WorkerReady(worker=number + 1))

    assert pool.abort is not None
    assert (pool.abort.item, pool.abort.cause) == (1, None)
    assert pool.abort.reason == f"failed {budget} times, the last time: node gone"


def test_workers_that_do_not_start_are_tried_again_later_and_later_and_at_last_no_more() -> None:
    schedule = Schedule(sizes=SIZES, most_workers=1)
    assert schedule.begin() == [Start(worker=0, delay=0)]
    assert schedule.handle(WorkerStartFailed(worker=0, reason="pip")) == [Start(worker=1, delay=1)]
    assert schedule.handle(WorkerLost(worker=1, reason="died")) == [Start(worker=2, delay=3)]
    assert [line.split(": ")[1] for line in schedule.log] == ["pip", "died"]

    (abort,) = schedule.handle(WorkerStartFailed(worker=2, reason="pip"))

    assert abort == Abort(item=None, reason="3 workers in a row failed to start: pip", cause=None)


def test_a_worker_that_comes_up_forgives_those_that_did_not() -> None:
    pool = Rehearsal(SIZES, 1)
    for worker in (0, 1):
        pool.tell(WorkerStartFailed(worker=worker, reason="pip"))
    pool.tell(WorkerReady(worker=2))

    pool.tell(WorkerLost(worker=2, reason="gone"))

    assert pool.starting == {3}  # with a delay of nothing, as the rehearsal has checked


def test_items_added_on_the_way_are_done_as_well() -> None:
    schedule = Schedule(sizes={0: 1}, most_workers=1)
    schedule.begin()
    schedule.handle(WorkerReady(worker=0))
    schedule.handle(ItemDone(worker=0, item=0))
    assert schedule.finished

    schedule.extend({7: 1, 8: 5})

    assert not schedule.finished
    assert schedule.begin() == [Assign(worker=0, item=8, attempt=1)]

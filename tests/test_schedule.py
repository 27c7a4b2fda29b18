"""The schedule: whatever happens to workers, every item is done once or the end has a name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rehearsal import FAST, SLOW, Rehearsal, possible

from actors.events import (
    ItemDone,
    ItemFailed,
    WorkerDraining,
    WorkerLost,
    WorkerReady,
    WorkerStartFailed,
)
from cluster.backlog import Item
from cluster.commands import Abort, Assign, Start
from cluster.crew import WorkerKind
from cluster.policies import HAND_BACK_SECONDS, MAX_ERRORS, MAX_LOSSES, MAX_START_FAILURES
from cluster.schedule import Schedule

SIZES = {0: 10, 1: 30, 2: 20}


def check_end(pool: Rehearsal) -> None:
    """Everything is done once, or the abort says which item or that nobody is left, and why."""
    assert len(set(pool.done)) == len(pool.done)
    if pool.abort is None:
        assert sorted(pool.done) == sorted(pool.sizes)
        return
    item, reason = pool.abort.item, pool.abort.reason
    if item is None:
        assert pool.waiting
        why = (f"{MAX_START_FAILURES} workers in a row failed to start: ", "no c", "there are no ")
        assert reason.startswith(why), reason
        return
    last = pool.past[-1]
    hopeless = isinstance(last, ItemFailed) and last.hopeless
    exhausted = pool.errors.get(item, 0) >= MAX_ERRORS or pool.losses.get(item, 0) >= MAX_LOSSES
    assert hopeless or exhausted
    if isinstance(last, ItemFailed):
        assert pool.abort.cause is last.error
        assert str(last.error) in reason
    assert all(count <= MAX_ERRORS for count in pool.errors.values())
    assert all(count <= MAX_LOSSES for count in pool.losses.values())


@given(st.data())
@settings(max_examples=500)
def test_any_sequence_of_events_ends_with_every_item_done_once_or_a_named_abort(
    data: st.DataObject,
) -> None:
    sizes = data.draw(st.dictionaries(st.integers(0, 30), st.integers(0, 5), max_size=7))
    most, slow = data.draw(st.integers(1, 4)), data.draw(st.integers(0, 2))
    devices = st.sampled_from([FAST, FAST, SLOW])  # at times of a kind that there is none of
    pinned = data.draw(st.dictionaries(st.sampled_from(sorted(sizes)), devices)) if sizes else {}
    holds, read_ahead = data.draw(st.booleans()), data.draw(st.booleans())
    pool = Rehearsal(sizes, most, slow, pinned, holds=holds, read_ahead=read_ahead)
    for _ in range(data.draw(st.integers(0, 40))):
        if pool.over:
            break
        stale = [event for event in pool.past if pool.is_stale(event)]
        if stale and data.draw(st.booleans()):
            pool.tell_again(data.draw(st.sampled_from(stale)))
        pool.tell(data.draw(st.sampled_from(possible(pool, bad=data.draw(st.booleans())))))
        if data.draw(st.booleans()) and not pool.over:
            pool.pass_time(data.draw(st.sampled_from([1, 20, 1000])))
    for _ in range(4 * len(sizes) + 9):  # from here on all goes well
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


def ready(most: int, sizes: Mapping[int, int] = SIZES, **options: Any) -> Rehearsal:
    """A pool whose workers are all up."""
    pool = Rehearsal(sizes, most, **options)
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
    assert pool.schedule.log == ["retrying item 1 after failure 1 of 3, on worker-0: bad"]
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


def test_a_worker_whose_node_is_going_finishes_and_gets_nothing_more() -> None:
    pool = ready(2)
    pool.tell(WorkerDraining(worker=0, seconds_left=100))
    assert (pool.running, pool.starting) == ({0: 1, 1: 2}, {2})  # another one comes at once

    pool.tell(ItemDone(worker=0, item=1))

    assert 0 in pool.gone
    assert pool.done == [1]
    assert pool.schedule.log == ["worker-0 gets nothing after item 1: its node is going"]


def test_what_cannot_be_finished_in_time_is_given_back_for_free() -> None:
    pool = ready(2)
    for left in (100, 50, HAND_BACK_SECONDS):
        pool.tell(WorkerDraining(worker=0, seconds_left=left))
    assert (pool.running, pool.gone) == ({1: 2}, {0})

    pool.tell(WorkerReady(worker=2))

    assert pool.running == {1: 2, 2: 1}
    assert (pool.errors, pool.losses) == ({}, {})
    assert pool.schedule.log[-1] == "worker-0 gives back item 1: its node is going"


def test_workers_lost_with_a_node_that_was_going_cost_nothing() -> None:
    pool = ready(1)
    for number in range(3 * MAX_LOSSES):
        pool.tell(WorkerDraining(worker=number, seconds_left=100))
        pool.tell(WorkerReady(worker=number + 1)) if number + 1 in pool.starting else None
        pool.tell(WorkerLost(worker=number, reason="node gone"))
        if number + 1 in pool.starting:
            pool.tell(WorkerReady(worker=number + 1))

    assert pool.abort is None


def test_workers_that_do_not_start_are_tried_again_later_and_later_and_at_last_no_more() -> None:
    schedule = Schedule([WorkerKind(name="cpu", most=1, ceiling=1)])
    schedule.extend({0: Item(size=1)})
    assert schedule.look(0) == [Start(worker=0, kind="cpu", delay=0)]
    failed = WorkerStartFailed(worker=0, reason="pip")
    assert schedule.handle(failed, 1) == [Start(worker=1, kind="cpu", delay=1)]
    lost = WorkerLost(worker=1, reason="died")
    assert schedule.handle(lost, 2) == [Start(worker=2, kind="cpu", delay=3)]
    assert [line.split(": ")[1] for line in schedule.log] == ["pip", "died"]

    (abort,) = schedule.handle(WorkerStartFailed(worker=2, reason="pip"), 3)

    assert abort == Abort(item=None, reason="3 workers in a row failed to start: pip", cause=None)


def test_a_worker_that_comes_up_forgives_those_that_did_not() -> None:
    pool = Rehearsal(SIZES, 1)
    for worker in (0, 1):
        pool.tell(WorkerStartFailed(worker=worker, reason="pip"))
    pool.tell(WorkerReady(worker=2))

    pool.tell(WorkerLost(worker=2, reason="gone"))

    assert pool.starting == {3}  # with a delay of nothing, as the rehearsal has checked


def test_those_that_are_up_go_on_when_no_more_come_up() -> None:
    pool = Rehearsal(SIZES, 4)
    pool.tell(WorkerReady(worker=0))
    while pool.starting:
        pool.tell(WorkerStartFailed(worker=min(pool.starting), reason="pip"))

    while not pool.over:
        pool.tell(ItemDone(worker=0, item=pool.running[0]))

    assert (pool.abort, pool.done) == (None, [1, 2, 0])
    assert pool.schedule.log[-1].startswith("no more cuda workers are started: 3 workers in a row")


def test_workers_that_start_together_on_a_node_that_dies_count_as_one_failure() -> None:
    pool = Rehearsal(dict.fromkeys(range(6), 1), 6)
    for worker in range(6):
        pool.tell(WorkerLost(worker=worker, reason="node died"))

    assert pool.failed_starts == {"cuda": 1}
    assert pool.starting == set(range(6, 12))
    assert len(pool.schedule.log) == 1


def test_a_node_whose_workers_all_fail_at_once_does_not_use_up_the_attempts() -> None:
    """Two workers of a node with a bad mount, beside one that is busy for long."""
    pool = Rehearsal({0: 9, 1: 5, 2: 5, 3: 5}, 3)
    for worker, node in enumerate(["good", "bad", "bad"]):
        pool.tell(WorkerReady(worker=worker, node=node))

    while pool.running.keys() & {1, 2}:
        for worker in sorted(pool.running.keys() & {1, 2}):
            fail(pool, worker)

    assert pool.running == {0: 0}
    assert pool.errors == {1: 1, 2: 1, 3: 1}
    while not pool.over:
        pool.tell(ItemDone(worker=0, item=pool.running[0]))
    assert (pool.abort, sorted(pool.done)) == (None, [0, 1, 2, 3])


def test_while_more_is_to_come_idle_workers_stay_and_are_replaced_only_when_needed() -> None:
    pool = ready(2, {0: 1, 1: 1}, holds=True)
    pool.tell(ItemDone(worker=0, item=0))
    assert pool.idle == {0}
    pool.tell(WorkerLost(worker=0, reason="node gone"))
    assert pool.starting == set()  # nothing waits

    pool.tell(WorkerLost(worker=1, reason="node gone"))

    assert pool.starting == {2}
    pool.tell(WorkerReady(worker=2))
    assert pool.running == {2: 1}


def test_items_added_on_the_way_are_done_as_well() -> None:
    schedule = Schedule([WorkerKind(name="cpu", most=1, ceiling=1)])
    schedule.extend({0: Item(size=1)})
    schedule.holds = True
    schedule.look(0)
    schedule.handle(WorkerReady(worker=0), 1)
    schedule.handle(ItemDone(worker=0, item=0), 2)
    assert schedule.finished

    schedule.extend({7: Item(size=1), 8: Item(size=5)})

    assert not schedule.finished
    assert schedule.look(3) == [Assign(worker=0, item=8, attempt=1)]

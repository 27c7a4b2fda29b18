"""Two kinds of worker in one queue, stragglers, full GPUs, and who is let go at the end."""

from __future__ import annotations

import pytest
from rehearsal import FAST, SLOW, Rehearsal, gave_up

from actors.events import ItemDone, ItemFailed, WorkerLost, WorkerReady, WorkerUnfit
from cluster.backlog import OVERHEAD_BYTES
from cluster.policies import HUNG_SECONDS, SLOWEST, STRAGGLER_FACTOR, STRAGGLER_SECONDS
from merge_core.errors import DeviceMemoryError

GB = 1_000_000_000


def finish(pool: Rehearsal, worker: int, after: float = 1.0) -> None:
    pool.tell(ItemDone(worker=worker, item=pool.running[worker]), after)


def up(pool: Rehearsal) -> Rehearsal:
    for worker in sorted(pool.starting):
        pool.tell(WorkerReady(worker=worker), after=0)
    return pool


def both(items: int, most: int = 1, slow: int = 1) -> Rehearsal:
    """Equal items, and workers of both kinds that are up: the fast ones have the first numbers."""
    return up(Rehearsal(dict.fromkeys(range(items), GB), most, slow))


def test_both_kinds_pull_from_one_queue() -> None:
    pool = both(9)
    assert pool.kind_of == {0: FAST, 1: SLOW}
    assert sorted(pool.running) == [0, 1]


@pytest.mark.parametrize(("items", "leaves"), [(9, False), (8, True)])
def test_a_slow_worker_leaves_what_the_fast_ones_are_through_with_sooner(
    items: int, leaves: bool
) -> None:
    pool = both(items)
    for _ in range(3):
        finish(pool, 0)

    finish(pool, 1)  # it took four times as long; the fast one has begun its fourth

    assert (1 in pool.gone) == leaves
    assert len(pool.waiting) == 3  # of four, or of three that the fast one does in three seconds
    while not pool.over:
        finish(pool, min(pool.running))
    assert sorted(pool.done) == list(range(items))


def test_slow_workers_do_not_leave_items_to_a_fast_one_that_hangs() -> None:
    pool = both(8)
    for _ in range(3):
        finish(pool, 0)
    finish(pool, 1)
    assert pool.gone == {1}
    assert len(pool.waiting) == 3

    pool.pass_time(STRAGGLER_SECONDS + 1)
    assert pool.starting == {2}
    pool.tell(WorkerReady(worker=2))
    while pool.waiting:
        finish(pool, 2, 4)
    finish(pool, 2, 4)
    pool.pass_time(1)  # nothing waits any more: the slow one gets what the fast one hangs in
    up(pool)
    finish(pool, max(pool.running), 4)

    assert (pool.over, pool.abort) == (True, None)
    assert sorted(pool.done) == list(range(8))


def test_slow_workers_do_all_of_it_where_no_fast_one_comes() -> None:
    pool = Rehearsal(dict.fromkeys(range(3), GB), 2, 1)
    assert [pool.kind_of[w] for w in sorted(pool.starting)] == [FAST, FAST, SLOW]
    pool.tell(WorkerReady(worker=2))

    pool.tell(gave_up(FAST))
    while not pool.over:
        finish(pool, 2)

    assert (pool.abort, pool.gone) == (None, {0, 1, 2})
    assert pool.schedule.log[-1] == "going on without cuda workers: none came"


def test_without_another_kind_the_end_of_patience_is_the_end() -> None:
    pool = Rehearsal({0: GB}, 2)

    pool.tell(gave_up(FAST))

    assert pool.abort is not None
    assert str(pool.abort.cause) == "no cuda"


def test_pinned_items_go_to_their_kind_alone() -> None:
    pool = up(Rehearsal(dict.fromkeys(range(4), GB), 1, 1, {0: SLOW, 1: FAST, 2: SLOW, 3: FAST}))
    for _ in range(2):
        assert {w: pool.pinned[n] for w, n in pool.running.items()} == pool.kind_of
        finish(pool, 0)
        finish(pool, 1)

    assert sorted(pool.done) == [0, 1, 2, 3]


def test_items_pinned_to_a_kind_that_does_not_come_end_the_run() -> None:
    pool = Rehearsal({0: GB, 1: GB}, 1, 1, {0: FAST})
    pool.tell(WorkerReady(worker=1))

    pool.tell(gave_up(FAST))

    assert pool.abort is not None


def straggling(most: int) -> Rehearsal:
    """Three items took ten seconds each, and the fourth goes on and on."""
    pool = up(Rehearsal(dict.fromkeys(range(4), GB), most))
    worker = max(pool.running)
    for _ in range(3):
        finish(pool, 0, 10)
    assert list(pool.running) == [worker]
    return pool


def test_an_item_that_takes_three_times_as_long_as_usual_is_given_to_a_second_worker() -> None:
    pool = straggling(2)
    assert pool.gone == {0}  # nothing was left for it
    pool.pass_time(STRAGGLER_FACTOR * 10 - pool.now)
    assert pool.starting == set()

    pool.pass_time(0.1)
    up(pool)

    assert pool.running == {1: 1, 2: 1}
    assert pool.schedule.log[-1] == (
        "giving item 1 to a second worker beside worker-1: it has taken 30 s, where 10 s are usual"
    )
    pool.pass_time(1000)
    assert pool.starting == set()  # two are enough


def test_the_first_of_two_workers_wins_and_the_other_is_let_go() -> None:
    pool = straggling(2)
    pool.pass_time(30)
    up(pool)

    finish(pool, 2)

    assert (pool.over, pool.abort, sorted(pool.done)) == (True, None, [0, 1, 2, 3])
    assert pool.schedule.log[-1] == "worker-1 is let go: worker-2 was first with item 1"


def test_a_second_worker_that_fails_costs_the_first_one_nothing() -> None:
    pool = straggling(2)
    pool.pass_time(30)
    up(pool)
    pool.tell(WorkerLost(worker=2, reason="gone"))
    assert pool.running == {1: 1}

    finish(pool, 1)

    assert sorted(pool.done) == [0, 1, 2, 3]


def test_nothing_is_given_out_twice_within_seconds_or_on_a_first_impression() -> None:
    pool = up(Rehearsal(dict.fromkeys(range(4), 1000), 2))
    for _ in range(3):
        finish(pool, 0, 0.01)
    pool.pass_time(STRAGGLER_SECONDS - 0.1)
    assert pool.starting == set()
    pool.pass_time(0.2)
    assert pool.starting != set()

    young = up(Rehearsal(dict.fromkeys(range(3), GB), 2))
    finish(young, 0)
    finish(young, 0)
    young.pass_time(HUNG_SECONDS)
    assert young.starting == set()


def test_a_worker_that_hangs_before_it_is_known_what_is_usual_is_not_waited_for_for_ever() -> None:
    pool = up(Rehearsal(dict.fromkeys(range(2), GB), 2))
    finish(pool, 0)
    patience = HUNG_SECONDS + (GB + OVERHEAD_BYTES) / SLOWEST
    pool.pass_time(patience - pool.now)
    assert pool.starting == set()

    pool.pass_time(1)
    up(pool)

    assert pool.running == {1: 1, 2: 1}
    assert pool.schedule.log[-1] == (
        "giving item 1 to a second worker beside worker-1: it has taken 804 s, and may hang"
    )
    finish(pool, 2)
    assert (pool.over, pool.gone) == (True, {0, 1, 2})


def test_a_worker_on_a_full_gpu_is_left_alone_and_another_takes_its_place() -> None:
    pool = Rehearsal(dict.fromkeys(range(4), GB), 3)
    pool.tell(WorkerUnfit(worker=0, reason="one lane needs 9 MB of VRAM"))
    pool.tell(WorkerReady(worker=1))

    assert pool.schedule.log == ["worker-0 is left alone: one lane needs 9 MB of VRAM"]
    assert (pool.starting, pool.left) == ({2}, {0})  # there are three GPUs, and it holds one
    while not pool.over:
        finish(pool, 1)
    assert pool.gone == {0, 1, 2}


def test_when_every_gpu_is_full_the_run_ends_and_says_so() -> None:
    pool = Rehearsal({0: GB, 1: GB}, 2)
    pool.tell(WorkerUnfit(worker=0, reason="full"))
    pool.tell(WorkerUnfit(worker=1, reason="fuller"))

    assert pool.abort is not None
    assert pool.abort.reason == "no cuda worker is of use, the last one: fuller"


def test_workers_that_come_too_late_for_any_item_are_not_waited_for() -> None:
    pool = Rehearsal(dict.fromkeys(range(4), GB), 4)
    pool.tell(WorkerReady(worker=0))
    finish(pool, 0)
    assert pool.starting == {1, 2}  # two items wait
    finish(pool, 0)

    assert pool.starting == {1}


@pytest.mark.parametrize("lost", [True, False])
def test_an_item_that_ran_out_of_memory_gets_fewer_lanes_wherever_it_goes(lost: bool) -> None:
    pool = up(Rehearsal({0: GB}, 1))
    error = DeviceMemoryError("no room", "cuda")
    if lost:
        event = WorkerLost(worker=0, reason="killed", out_of_memory=True)
    else:
        event = ItemFailed(worker=0, item=0, error=error)

    commands = pool.schedule.handle(event, 1)
    if lost:
        commands = pool.schedule.handle(WorkerReady(worker=1), 2)

    assert [(c.attempt, c.shrink) for c in commands] == [(2, 1)]

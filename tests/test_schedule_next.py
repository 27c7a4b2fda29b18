"""What a worker will be given next: it is told with its item, so that it may prepare for that."""

from __future__ import annotations

from rehearsal import Rehearsal

from actors.events import ItemDone, ItemFailed, WorkerDraining, WorkerLost, WorkerReady
from cluster.backlog import Item
from cluster.commands import Assign
from cluster.crew import WorkerKind
from cluster.schedule import Schedule


def ready(items: int, most: int) -> Rehearsal:
    """Equal items, and workers that are up."""
    pool = Rehearsal(dict.fromkeys(range(items), 10), most, read_ahead=True)
    for worker in sorted(pool.starting):
        pool.tell(WorkerReady(worker=worker))
    return pool


def finish(pool: Rehearsal, worker: int) -> None:
    pool.tell(ItemDone(worker=worker, item=pool.running[worker]))


def test_a_worker_gets_what_it_was_told_before() -> None:
    pool = ready(9, 2)
    assert pool.running == {0: 0, 1: 1}
    assert pool.next == {0: 2, 1: 3}

    finish(pool, 1)
    finish(pool, 1)

    assert pool.running == {0: 0, 1: 4}
    assert pool.next == {0: 2, 1: 5}
    finish(pool, 0)
    assert pool.running == {0: 2, 1: 4}


def test_who_has_nothing_else_takes_what_another_one_was_told() -> None:
    pool = ready(4, 2)
    assert pool.next == {0: 2, 1: 3}

    finish(pool, 1)
    finish(pool, 1)

    assert pool.running == {0: 0, 1: 2}
    finish(pool, 0)
    assert pool.done == [1, 3, 0]
    assert pool.gone == {0}


def test_what_a_worker_was_told_is_anybody_s_once_it_is_gone_or_going() -> None:
    for event in (
        WorkerLost(worker=0, reason="gone"),
        WorkerDraining(worker=0, seconds_left=1000),
    ):
        pool = ready(9, 2)
        assert pool.next[0] == 2
        pool.tell(event)

        pool.tell(WorkerReady(worker=2))

        assert 2 in (pool.running[2], pool.next[2])


def test_a_larger_item_that_comes_back_goes_first() -> None:
    pool = Rehearsal({0: 30, 1: 20, 2: 10}, 1, read_ahead=True)
    pool.tell(WorkerReady(worker=0))
    assert pool.next == {0: 1}

    pool.tell(ItemFailed(worker=0, item=0, error=RuntimeError("bad")))

    assert pool.running == {0: 0}
    assert pool.next == {0: 1}


def test_nothing_of_another_rank_is_told() -> None:
    """Merges do not prepare for checks, nor checks for merges."""
    schedule = Schedule([WorkerKind(name="cpu", most=1, ceiling=1)])
    schedule.extend(
        {
            0: Item(size=1, rank=1, read_ahead=True),
            1: Item(size=5, rank=2, read_ahead=True),
        }
    )
    schedule.look(0)

    commands = schedule.handle(WorkerReady(worker=0), 1)

    assert commands == [Assign(worker=0, item=0, attempt=1)]

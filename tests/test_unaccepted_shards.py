"""A shard that nobody accepted is in nobody's way, and what others made is not removed for it."""

from __future__ import annotations

import pytest
from handmade import TWO_LANES, ignore_progress
from leases import unheard
from s3_server import uploads

from merge_core import commit
from merge_core.commit import Assembly
from merge_core.errors import RaymeldError, StorageError, TakenError
from merge_core.factors import seal
from merge_core.merge import claim, merge
from merge_core.model_card import CARD
from merge_core.output import receipt_name
from merge_core.plan import MergePlan
from merge_core.progress import Progress
from merge_core.stores.location import Location, locate
from merge_core.stores.opening import open_store
from merge_core.stores.store import Store
from merge_core.worker import ShardWorker


@pytest.fixture(scope="module")
def expected(small: MergePlan, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("unaccepted") / "out"
    merge(small, out, choice=TWO_LANES)
    return contents(locate(out))


def contents(out: Location) -> dict[str, bytes]:
    store = open_store(out)
    names = {one.name for one in store.list()}
    return {n: store.get(n) for n in names if not n.startswith(".raymeld/") and n != CARD}


def stop_after_two(plan: MergePlan, out: Location) -> None:
    def watch(progress: Progress) -> None:
        if progress.done > sum(shard.size for shard in plan.shards[:2]):
            raise RaymeldError("stopped")

    with pytest.raises(RaymeldError, match="stopped"):
        merge(plan, out, choice=TWO_LANES, watch=watch)


def test_a_shard_whose_receipt_is_gone_is_removed_and_merged_again(
    small: MergePlan, expected: dict[str, bytes], store: Store
) -> None:
    """As of a driver that died between the two deletions of ``forget``."""
    out = store.location
    stop_after_two(small, out)
    store.delete(receipt_name(0))

    assert merge(small, out, choice=TWO_LANES).resumed == 1
    assert contents(out) == expected
    assert out.scheme != "s3" or uploads(out) == []


def test_a_shard_that_came_late_is_removed_before_anything_is_merged(
    small: MergePlan, expected: dict[str, bytes]
) -> None:
    """As by a request to complete it that a store did after its sender was killed."""
    out, name = locate("memory://late"), small.shards[3].name
    store = open_store(out)
    stop_after_two(small, out)
    store.put(name, b"of an attempt that nobody accepted")
    seen: list[bool] = []

    def watch(progress: Progress) -> None:
        if progress.phase == "merging" and not seen:
            seen.append(name in contents(out))

    assert merge(small, out, choice=TWO_LANES, watch=watch).resumed == 2
    assert seen == [False]
    assert contents(out) == expected


def test_what_another_writer_made_meanwhile_is_not_removed_by_who_finds_it(
    small: MergePlan, expected: dict[str, bytes], store: Store
) -> None:
    out, name, theirs = store.location, small.shards[2].name, b"another writer's"

    def watch(progress: Progress) -> None:
        if progress.phase == "merging":
            store.put(name, theirs)

    with pytest.raises(TakenError, match=f"{name}: there is a file of that name"):
        merge(small, out, choice=TWO_LANES, watch=watch)
    assert store.get(name) == theirs
    assert receipt_name(2) not in {one.name for one in store.list()}

    assert merge(small, out, choice=TWO_LANES).resumed == 2  # who has the lease, has the names
    assert contents(out) == expected


def test_a_shard_that_could_not_even_be_forgotten_is_taken_from_another_attempt(
    small: MergePlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the next attempt would be thrown away as the twin of one that was never there."""
    plan, out = seal(small), locate("memory://unforgotten")
    looked = iter([True])

    def is_held(*_: object) -> bool:
        if next(looked, False):
            return True
        raise StorageError("does not answer")

    with claim(plan, out, overwrite=False, say=unheard) as holder:
        assert holder is not None
        assembly, worker = Assembly(plan, out, holder.run), ShardWorker(plan, out, "cpu", "a")
        first, second = (worker.merge(0, attempt, ignore_progress) for attempt in (1, 2))
        with monkeypatch.context() as gone:
            gone.setattr(Assembly, "_publish_shard", lambda *_: open_store(out).get("not there"))
            gone.setattr(commit, "is_held", is_held)
            with pytest.raises(StorageError, match="does not answer"):
                assembly.accept(first)

        assert assembly.accept(second)
        worker.close()
    assert plan.shards[0].name in contents(out)

"""Shards in one process: one is published while the next is merged."""

from __future__ import annotations

import threading

import pytest
from handmade import TWO_LANES

from merge_core.commit import Assembly
from merge_core.errors import StorageError
from merge_core.lease import holder_of
from merge_core.ledger import Receipt
from merge_core.merge import merge
from merge_core.plan import MergePlan
from merge_core.progress import Progress
from merge_core.stores import last_writes
from merge_core.stores.location import locate
from merge_core.worker import ShardWorker


def test_a_publication_that_fails_ends_the_shard_after_it(
    small: MergePlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[int] = []
    honest = ShardWorker.merge

    def counted(self: ShardWorker, index: int, *others: object, **named: object) -> Receipt:
        begun.append(index)
        return honest(self, index, *others, **named)  # type: ignore[arg-type]

    def fail(_: Assembly, receipt: Receipt) -> bool:
        raise StorageError("the store is full", str(receipt.shard))

    monkeypatch.setattr(ShardWorker, "merge", counted)
    monkeypatch.setattr(Assembly, "accept", fail)
    with pytest.raises(StorageError, match="0: the store is full"):
        merge(small, locate("memory://inline/full"), choice=TWO_LANES)
    assert begun in ([0], [0, 1])


def test_the_lease_is_kept_while_a_shard_is_still_being_published(
    small: MergePlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(last_writes, "SECONDS", 0.05)
    out, published = locate("memory://inline/slow"), threading.Event()
    honest = Assembly.accept

    def accept(self: Assembly, receipt: Receipt) -> bool:
        published.wait()
        return honest(self, receipt)

    def stop(progress: Progress) -> None:
        if progress.done > small.shards[0].size:
            raise KeyboardInterrupt

    monkeypatch.setattr(Assembly, "accept", accept)
    with pytest.raises(KeyboardInterrupt):
        merge(small, out, choice=TWO_LANES, watch=stop)
    assert holder_of(out) is not None

    published.set()
    last_writes._under_way[out.scheme, out.root, out.access].result(30)
    assert holder_of(out) is None

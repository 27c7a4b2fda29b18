"""A store that does not answer says nothing of what it keeps: nothing that is done is given up."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from handmade import TWO_LANES, small_merge

from merge_core import output
from merge_core.errors import RaymeldError, StorageError
from merge_core.merge import merge
from merge_core.output import check_prepared, prepare
from merge_core.plan import MergePlan
from merge_core.progress import Progress
from merge_core.stores.location import Location, locate
from merge_core.stores.objects import ObjectsStore
from merge_core.stores.opening import open_store
from merge_core.stores.store import FileIdentity, Reader


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> MergePlan:
    return small_merge(tmp_path_factory.mktemp("outage"))


@contextmanager
def weights_out_of_reach(out: Location) -> Iterator[None]:
    opened = ObjectsStore.open

    def open_some(store: ObjectsStore, file: FileIdentity) -> Reader:
        if store.location == out and file.name.endswith(".safetensors"):
            raise StorageError("does not answer", str(out / file.name))
        return opened(store, file)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ObjectsStore, "open", open_some)
        yield


def test_what_is_done_outlives_an_outage_while_it_is_proven(plan: MergePlan) -> None:
    out = locate("memory://outage/while-proving")

    def stop(progress: Progress) -> None:
        if progress.done > sum(shard.size for shard in plan.shards[:2]):
            raise RaymeldError("stopped")

    with pytest.raises(RaymeldError, match="stopped"):
        merge(plan, out, choice=TWO_LANES, watch=stop)
    with weights_out_of_reach(out), pytest.raises(StorageError, match="does not answer"):
        merge(plan, out, choice=TWO_LANES)

    assert merge(plan, out, choice=TWO_LANES).resumed == 2


def test_a_shard_that_cannot_be_looked_at_once_accepted_is_merged_again(plan: MergePlan) -> None:
    out = locate("memory://outage/while-accepting")
    with weights_out_of_reach(out), pytest.raises(StorageError, match="does not answer"):
        merge(plan, out, choice=TWO_LANES)

    assert merge(plan, out, choice=TWO_LANES).resumed == 0
    listed = {one.name for one in open_store(out).list()}
    assert {shard.name for shard in plan.shards} < listed
    assert not [name for name in listed if "parts" in name or "receipts" in name]


def test_who_cannot_read_the_plan_is_told_why(
    plan: MergePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from merge_core.factors import seal

    def refused(where: Location) -> bytes:
        raise StorageError("there are no credentials", str(where))

    sealed, out = seal(plan), locate(tmp_path / "out")
    prepare(out, sealed)
    check_prepared(out, sealed)
    with pytest.raises(StorageError, match="another place of that name"):
        check_prepared(locate(tmp_path / "other"), sealed)
    monkeypatch.setattr(output, "read_file", refused)
    with pytest.raises(StorageError, match="no credentials"):
        check_prepared(out, sealed)

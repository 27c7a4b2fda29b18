"""Uploads to GCS that nobody will finish: found below one OUT, and aborted there alone."""

from __future__ import annotations

from urllib.parse import parse_qs, urlsplit

import pytest
from fault_proxy import Fault, FaultProxy
from gcs_server import Gcs
from network_faults import drop, lose_answer, say

from merge_core.errors import StorageError
from merge_core.stores.gcs import GcsStore
from merge_core.stores.location import Location


def left_behind(gcs: Gcs, bucket: str, *keys: str) -> None:
    """By somebody who died."""
    for key in keys:
        gcs.begin(bucket, key)


def keys(gcs: Gcs, store: GcsStore) -> list[str]:
    """Of the uploads under way."""
    return sorted(upload.key for upload in gcs.uploads_of(store.location.root).values())


OURS = ("out/.raymeld/parts/model-1/1-a", "out/.raymeld/parts/model-10/1-b")
OTHERS = (
    "out2/.raymeld/parts/model-1/1-a",
    "out/model-1",
    "out/.raymeld/partsnot/x",
    "nested/out/.raymeld/parts/model-1/1-a",
    "zebra",
)


@pytest.fixture
def swept(gs_store: GcsStore, gcs: Gcs, monkeypatch: pytest.MonkeyPatch) -> GcsStore:
    """Where three of ours and some of others lie, in lists of two at a time."""
    monkeypatch.setattr(gcs, "page", 2)
    left_behind(gcs, gs_store.location.root, OURS[0], *OURS, *OTHERS)
    return gs_store


def test_uploads_of_parts_are_aborted_and_no_others(swept: GcsStore, gcs: Gcs) -> None:
    swept.sweep()
    assert keys(gcs, swept) == sorted(OTHERS)
    swept.sweep()
    assert keys(gcs, swept) == sorted(OTHERS)


def test_uploads_of_the_parts_of_one_file_are_aborted_and_those_of_others_not_listed(
    swept: GcsStore, gcs: Gcs, gs_proxy: FaultProxy
) -> None:
    swept.sweep("model-1")
    assert keys(gcs, swept) == sorted((OURS[1], *OTHERS))
    queries = [parse_qs(urlsplit(one.target).query) for one in gs_proxy.seen("GET", "uploads")]
    assert [query["prefix"] for query in queries] == [["out/.raymeld/parts/model-1/"]]


def test_all_of_a_bucket_may_be_out(gs: Location, gcs: Gcs) -> None:
    left_behind(gcs, gs.root, ".raymeld/parts/model-1/1-a", *OTHERS)
    GcsStore(gs).sweep()
    assert keys(gcs, GcsStore(gs)) == sorted(OTHERS)


@pytest.mark.parametrize("how", [drop, lose_answer, say(503), say(429)])
@pytest.mark.parametrize("method", ["GET", "DELETE"])
def test_a_sweep_that_fails_once_goes_on(
    swept: GcsStore, gs_proxy: FaultProxy, gcs: Gcs, method: str, how: object
) -> None:
    gs_proxy.faults(Fault(how, method=method, path="upload", skip=1))
    swept.sweep()
    assert keys(gcs, swept) == sorted(OTHERS)


def test_who_may_not_list_uploads_is_told_which_right_is_missing(
    swept: GcsStore, gs_proxy: FaultProxy
) -> None:
    gs_proxy.faults(Fault(say(403), method="GET", path="uploads"))
    with pytest.raises(StorageError, match=r"parts: .*GCS answers 403.*roles/storage.objectUser"):
        swept.sweep()


def test_an_upload_that_another_sweep_ended_is_no_failure(
    swept: GcsStore, gs_proxy: FaultProxy
) -> None:
    gs_proxy.faults(Fault(say(404), method="DELETE", path="uploadId"))
    swept.sweep()

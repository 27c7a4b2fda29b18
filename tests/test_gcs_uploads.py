"""Uploads to GCS that nobody will finish: found below one OUT, and aborted there alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from backends import DATA
from fault_proxy import Fault, FaultProxy
from gcs_server import Gcs
from network_faults import drop, lose_answer, say

from merge_core.errors import StorageError
from merge_core.stores import gcs_client
from merge_core.stores.gcs import GcsStore
from merge_core.stores.location import Access, Location


def left_behind(gcs: Gcs, bucket: str, *keys: str) -> None:
    """By somebody who died."""
    for key in keys:
        gcs.begin(bucket, key)


def keys(gcs: Gcs) -> list[str]:
    """Of the uploads under way."""
    return sorted(upload.key for upload in gcs.uploads.values())


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
    assert keys(gcs) == sorted(OTHERS)
    swept.sweep()
    assert keys(gcs) == sorted(OTHERS)


def test_uploads_of_the_parts_of_one_file_are_aborted(swept: GcsStore, gcs: Gcs) -> None:
    swept.sweep("model-1")
    assert keys(gcs) == sorted((OURS[1], *OTHERS))


def test_all_of_a_bucket_may_be_out(gs: Location, gcs: Gcs) -> None:
    left_behind(gcs, gs.root, ".raymeld/parts/model-1/1-a", *OTHERS)
    GcsStore(gs).sweep()
    assert keys(gcs) == sorted(OTHERS)


@pytest.mark.parametrize("how", [drop, lose_answer, say(503), say(429)])
@pytest.mark.parametrize("method", ["GET", "DELETE"])
def test_a_sweep_that_fails_once_goes_on(
    swept: GcsStore, gs_proxy: FaultProxy, gcs: Gcs, method: str, how: object
) -> None:
    gs_proxy.faults(Fault(how, method=method, path="upload", skip=1))
    swept.sweep()
    assert keys(gcs) == sorted(OTHERS)


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


def test_a_token_that_has_an_end_is_renewed_before_it(gs_store: GcsStore, gcs: Gcs) -> None:
    first = gcs.tokens.copy()
    gcs.lifetime = 100  # which is less than what is kept in hand
    try:
        for _ in range(3):
            gs_store.put("a", b"x")
            gs_store.sweep()
    finally:
        gcs.lifetime = 3600
    assert len(gcs.tokens - first) > 1


def test_who_has_no_credentials_is_told_where_they_are_looked_for(
    gs: Location, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("GOOGLE_APPLICATION_CREDENTIALS")
    monkeypatch.setenv("CLOUDSDK_CONFIG", str(tmp_path))
    gcs_client.login.cache_clear()
    for ask in (GcsStore(gs).sweep, lambda: GcsStore(gs).look("a")):
        with pytest.raises(StorageError, match=r"no credentials .*gcloud auth .*--anonymous"):
            ask()


def test_a_key_that_is_refused_is_an_error_without_the_key(
    gs: Location, gcs: Gcs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gcs, "refuses_keys", True)
    with pytest.raises(StorageError, match="the credentials are not accepted, or no token"):
        GcsStore(gs).look("a")
    with pytest.raises(StorageError, match=r"cannot be aborted: RefreshError"):
        GcsStore(gs).sweep()


def test_anybody_reads_a_public_bucket_and_nobody_else_writes_there(
    gs: Location, gcs: Gcs, monkeypatch: pytest.MonkeyPatch
) -> None:
    GcsStore(gs).put("base", DATA)
    gcs.public.add(gs.root)
    monkeypatch.delenv("GOOGLE_APPLICATION_CREDENTIALS")
    anonymous = GcsStore(
        Location(scheme="gs", root=gs.root, access=Access(anonymous=True)),
    )
    assert anonymous.get("base") == DATA
    assert [one.name for one in anonymous.list()] == ["base"]
    assert bytes(anonymous.open(anonymous.look("base")).read(5, 10)) == DATA[5:15]
    with pytest.raises(StorageError, match=r"base: the credentials .*--anonymous only reads"):
        anonymous.put("base", b"x")
    with pytest.raises(StorageError, match="GCS answers 403"):
        anonymous.sweep()


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("https://me:secret@storage.example", "storage.example: GOOGLE_BASE_URL holds credentials"),
        ("storage.example", "GOOGLE_BASE_URL=storage.example: is no address of a server"),
    ],
)
def test_an_address_that_is_none_or_holds_a_secret_is_refused(
    gs: Location, monkeypatch: pytest.MonkeyPatch, url: str, said: str
) -> None:
    monkeypatch.setenv("GOOGLE_BASE_URL", url)
    with pytest.raises(ValueError, match=said) as refused:
        GcsStore(gs).look("a")
    assert "secret" not in str(refused.value)


def test_a_server_of_another_api_is_not_passed_over(
    gs: Location, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GOOGLE_BASE_URL")
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://127.0.0.1:9023")
    with pytest.raises(ValueError, match=r"STORAGE_EMULATOR_HOST: .*JSON API.*GOOGLE_BASE_URL"):
        GcsStore(gs).look("a")

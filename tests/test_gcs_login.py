"""Who one is to GCS: credentials as google-auth finds them, tokens that end, and none at all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from backends import DATA
from gcs_server import POD, Gcs

from merge_core.errors import StorageError
from merge_core.stores import gcs_client
from merge_core.stores.gcs import GcsStore
from merge_core.stores.location import Access, Location

POOL = "projects/1/locations/global/workloadIdentityPools/pool"


def test_a_pod_of_another_cloud_gets_in_with_what_its_own_issuer_gave_it(
    gs: Location, gcs: Gcs, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "pod").write_text(POD)
    federated = {
        "type": "external_account",
        "audience": f"//iam.googleapis.com/{POOL}/providers/issuer",
        "subject_token_type": "urn:ietf:params:oauth:token-type:jwt",
        "token_url": f"{gcs.address}/token",
        "credential_source": {"file": str(tmp_path / "pod")},
    }
    (tmp_path / "federated.json").write_text(json.dumps(federated))
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "federated.json"))
    store = GcsStore(gs)
    store.put("a", DATA)
    assert store.get("a") == DATA
    gcs.begin(gs.root, ".raymeld/parts/model/1-a")
    store.sweep()
    assert gcs.uploads_of(gs.root) == {}


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


def test_a_bucket_that_is_not_there_and_one_that_may_not_be_listed_are_said_in_words(
    gs: Location,
) -> None:
    nowhere = GcsStore(Location(scheme="gs", root="nowhere"))
    with pytest.raises(StorageError, match=r"^gs://nowhere: there is no such bucket[.] Check its"):
        list(nowhere.list())
    stranger = Location(scheme="gs", root=gs.root, access=Access(anonymous=True))
    with pytest.raises(StorageError, match=rf"^gs://{gs.root}: access is denied[.] Log in"):
        list(GcsStore(stranger).list())


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

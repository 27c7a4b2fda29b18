"""What is said when S3 refuses or cannot be reached, and what never is."""

from __future__ import annotations

import dataclasses
import logging
import os
import pickle

import pytest
from backends import written
from fault_proxy import Fault, FaultProxy
from network_faults import (
    drop,
    drop_within,
)
from s3_server import SECRET, TOKEN, refusal

from merge_core.errors import AbsentError, InputError, RaymeldError, StorageError
from merge_core.stores.location import Access, Location
from merge_core.stores.retries import Retries
from merge_core.stores.s3 import S3Store
from merge_core.stores.s3_client import client_for


@pytest.mark.parametrize(
    ("status", "code", "said"),
    [
        (404, "NoSuchBucket", "there is no such bucket"),
        (403, "AccessDenied", "access is denied"),
        (403, "InvalidAccessKeyId", "does not know this access key"),
        (400, "ExpiredToken", "the credentials have expired"),
        (400, "InvalidToken", "the session token is not valid"),
        (403, "RequestTimeTooSkewed", "this machine's clock is wrong"),
        (403, "InvalidObjectState", "the object is archived"),
        (400, "AuthorizationHeaderMalformed", "the bucket is in another region"),
        (501, "NotImplemented", "the server lacks something"),
        (507, "InsufficientStorage", "the store is full"),
        (418, "Teapot", r"S3 answers Teapot: 'no'"),
    ],
)
def test_what_s3_answers_is_said_in_words(
    s3_store: S3Store, s3_proxy: FaultProxy, status: int, code: str, said: str
) -> None:
    s3_proxy.faults(Fault(refusal(status, code), times=None))
    with pytest.raises(StorageError, match=rf"^s3://bucket-\d+/out/base: .*{said}.*[.] .+[.]$"):
        s3_store.get("base")


def test_a_condition_that_nobody_made_is_not_taken_for_a_file_that_changed(
    s3_store: S3Store, s3_proxy: FaultProxy
) -> None:
    s3_proxy.faults(Fault(refusal(412, "PreconditionFailed"), times=None))
    with pytest.raises(StorageError, match="S3 answers PreconditionFailed"):
        list(s3_store.list())


def test_a_wrong_secret_is_said(s3: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another")
    stranger = fresh(s3)
    with pytest.raises(StorageError, match="the secret key does not fit"):
        stranger.get("base")
    with pytest.raises(StorageError, match="access is denied"):
        stranger.look("base")


def fresh(location: Location) -> S3Store:
    """Reached by a client of its own, which looks for credentials again."""
    access = dataclasses.replace(location.access, region=f"region-{os.urandom(4).hex()}")
    return S3Store(dataclasses.replace(location, access=access))


def test_missing_credentials_are_said(s3: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name)
    with pytest.raises(StorageError, match="no credentials were found"):
        fresh(s3).get("base")


def test_a_profile_that_is_not_there_is_said(s3: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(StorageError, match="the credentials are incomplete"):
        fresh(s3).get("base")


def test_a_bucket_that_is_not_there_is_said(s3: Location) -> None:
    store = S3Store(dataclasses.replace(s3, root="nowhere"))
    for ask in (lambda: store.get("a"), lambda: list(store.list()), lambda: store.put("a", b"")):
        with pytest.raises(StorageError, match=r"s3://nowhere.*there is no such bucket") as caught:
            ask()
        assert not isinstance(caught.value, AbsentError)


def test_a_server_that_cannot_be_reached_is_said(
    s3: Location, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Retries, "seconds", lambda *_: 0.0)
    access = Access(endpoint_url="http://127.0.0.1:9")
    with pytest.raises(StorageError, match="the server cannot be reached"):
        S3Store(dataclasses.replace(s3, access=access)).get("base")


def test_anonymous_reads_are_not_signed(s3_store: S3Store, s3_proxy: FaultProxy) -> None:
    access = dataclasses.replace(s3_store.location.access, anonymous=True)
    with pytest.raises(StorageError):  # Swift would want a signature
        S3Store(dataclasses.replace(s3_store.location, access=access)).get("base")
    assert {"authorization" in seen.headers for seen in s3_proxy.seen()} == {False}


def test_the_endpoint_may_come_from_the_environment(
    s3: Location, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert s3.access.endpoint_url is not None
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", s3.access.endpoint_url)
    S3Store(s3).put("a", b"x")
    assert fresh(dataclasses.replace(s3, access=Access())).get("a") == b"x"


def test_an_endpoint_with_credentials_is_refused(s3: Location) -> None:
    access = Access(endpoint_url="http://somebody:something@127.0.0.1:9")
    with pytest.raises(InputError, match="holds credentials") as caught:
        S3Store(dataclasses.replace(s3, access=access)).get("a")
    assert "something" not in str(caught.value)


def test_an_endpoint_that_is_no_address_is_refused(s3: Location) -> None:
    access = Access(endpoint_url="localhost:9000")
    with pytest.raises(InputError, match="localhost:9000: is no address of a server"):
        S3Store(dataclasses.replace(s3, access=access)).get("a")


def test_the_region_may_come_from_the_variable_that_containers_have(
    s3: Location, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_DEFAULT_REGION", raising=False)
    monkeypatch.setenv("AWS_REGION", "eu-west-3")
    access = dataclasses.replace(s3.access, anonymous=True, region=None)
    assert client_for(access).meta.region_name == "eu-west-3"


def test_secrets_are_in_no_error_log_or_pickle(
    s3_store: S3Store, s3_proxy: FaultProxy, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    written(s3_store, "model")
    s3_proxy.faults(
        Fault(refusal(403, "SignatureDoesNotMatch", f"{TOKEN} {SECRET}"), path="/out/base"),
        Fault(drop_within(10), path="/out/model", times=None),
        Fault(drop, times=None),
    )
    said = [repr(s3_store), repr(s3_store.start), pickle.dumps(s3_store)]
    for name in ("base", "other"):
        with pytest.raises(RaymeldError) as caught:
            s3_store.get(name)
        said += [str(caught.value), repr(caught.value), pickle.dumps(caught.value)]
    said += [record.getMessage() for record in caplog.records]
    text = "\n".join(str(one) for one in said)
    assert (TOKEN in text, SECRET in text, "Signature=" in text) == (False, False, False)

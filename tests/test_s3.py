"""What only S3 has: multipart uploads that outlive their process, and an unreliable way there."""

from __future__ import annotations

import dataclasses
import logging
import os
import pickle
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from fault_proxy import Exchange, Fault, FaultProxy
from network_faults import (
    drop,
    drop_within,
    lengthen,
    lose_answer,
    misplace,
    say,
    shorten,
    stall,
    unrange,
)
from s3_server import SECRET, TOKEN

from merge_core.errors import AbsentError, InputError, RaymeldError, StorageError
from merge_core.stores import retries, s3, s3_client, s3_parts
from merge_core.stores.location import Access, Location
from merge_core.stores.s3 import S3Store
from merge_core.stores.s3_client import client_for

DATA = bytes(range(256)) * 1024
"""256 KiB."""


@pytest.fixture(autouse=True)
def small_and_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3_parts, "PART_BYTES", 64 << 10)
    monkeypatch.setattr(retries, "FIRST_PAUSE", 0.001)
    monkeypatch.setattr(
        "botocore.retries.standard.ExponentialBackoff.delay_amount", lambda *_: 0.001
    )


@pytest.fixture
def proxy(s3: Location, s3_address: str) -> Iterator[FaultProxy]:
    with FaultProxy(s3_address) as proxy:
        yield proxy


@pytest.fixture
def store(s3: Location, proxy: FaultProxy) -> S3Store:
    """Reached through the proxy, by a client of its own."""
    return S3Store(dataclasses.replace(s3 / "out", access=Access(endpoint_url=proxy.address)))


def uploads(location: Location) -> list[str]:
    """Keys of all multipart uploads under way in a bucket."""
    found = client_for(location.access).list_multipart_uploads(Bucket=location.root)
    return [upload["Key"] for upload in found.get("Uploads", ())]


def written(store: S3Store, name: str, data: bytes = DATA, attempt: str = "1-a") -> str:
    part = store.start(name, len(data), attempt)
    part.write(memoryview(data), 0)
    return part.finish()


# Writers that die


WRITER = """
    import sys
    from merge_core.stores import s3_parts
    from merge_core.stores.location import Access, locate
    from merge_core.stores.s3 import S3Store

    s3_parts.PART_BYTES = 64 << 10
    store = S3Store(locate(sys.argv[1], Access(endpoint_url=sys.argv[2])))
    part = store.start("model.safetensors", 200_000, "1-a")
    part.write(memoryview(bytes(150_000)), 0)
    print("two of four parts are there", flush=True)
    sys.stdin.read()
"""


def test_a_killed_writer_leaves_no_object_and_the_next_sweep_ends_its_upload(s3: Location) -> None:
    command = [
        sys.executable,
        "-c",
        textwrap.dedent(WRITER),
        str(s3 / "out"),
        s3.access.endpoint_url,
    ]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline()
        os.kill(writer.pid, signal.SIGKILL)
    store = S3Store(s3 / "out")
    assert list(store.list()) == []
    assert uploads(s3) == ["out/model.safetensors"]

    store.sweep()
    assert uploads(s3) == []


def test_a_sweep_ends_no_uploads_beside_the_folder_or_of_longer_names(s3: Location) -> None:
    store, beside = S3Store(s3 / "out"), S3Store(s3 / "out2")
    for name in ("model", "model2"):
        store.start(name, 1, "1-a")
    beside.start("model", 1, "1-a")

    store.sweep("model")
    assert uploads(s3) == ["out/model2", "out2/model"]
    store.sweep()
    assert uploads(s3) == ["out2/model"]


def test_what_publishes_may_be_another_process(s3: Location) -> None:
    part = written(S3Store(s3 / "out"), "model")
    publish = f"""
        from merge_core.stores.location import Access, locate
        from merge_core.stores.s3 import S3Store

        store = S3Store(locate("{s3 / "out"}", Access(endpoint_url="{s3.access.endpoint_url}")))
        store.publish("{part}", "model", {len(DATA)})
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(publish)], check=True)
    assert S3Store(s3 / "out").get("model") == DATA


# Reads through a bad connection


def reading(store: S3Store) -> bytes:
    """A file put there and read in one range."""
    store.put("base", DATA)
    reader = store.open(store.look("base"))
    data = bytes(reader.read(0, len(DATA)))
    reader.close()
    return data


@pytest.mark.parametrize(
    "how",
    [
        pytest.param(drop, id="dropped"),
        pytest.param(drop_within(100_000), id="cut"),
        pytest.param(say(503), id="503"),
        pytest.param(say(500), id="500"),
    ],
)
def test_a_read_that_fails_once_is_tried_again(store: S3Store, proxy: FaultProxy, how: Any) -> None:
    proxy.faults(Fault(how, method="GET", path="/out/base"))
    assert reading(store) == DATA
    assert len(proxy.seen("GET", "/out/base")) == 2


def test_what_is_left_of_a_block_is_asked_for_again_and_no_more(
    store: S3Store, proxy: FaultProxy
) -> None:
    proxy.faults(Fault(drop_within(100_000), method="GET", path="/out/base", times=2))
    assert reading(store) == DATA
    asked = [seen.headers["range"] for seen in proxy.seen("GET", "/out/base")]
    assert asked == ["bytes=0-262143", "bytes=100000-262143", "bytes=200000-262143"]


def test_a_read_that_stalls_is_tried_again_soon(
    store: S3Store, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_client, "STALL_SECONDS", 0.3)
    proxy.faults(Fault(stall(100_000), method="GET", path="/out/base"))
    assert reading(store) == DATA
    assert len(proxy.seen("GET", "/out/base")) == 2


def test_a_read_that_never_comes_to_its_end_is_an_error(store: S3Store, proxy: FaultProxy) -> None:
    proxy.faults(Fault(drop_within(10), method="GET", path="/out/base", times=None))
    with pytest.raises(StorageError, match=r"out/base: the connection broke or stalled"):
        reading(store)
    assert len(proxy.seen("GET", "/out/base")) == retries.TRIES


def whole(exchange: Exchange) -> None:
    """As from a server that knows no ranges."""
    answer = exchange.answered().having("Content-Range", None)
    exchange.send(dataclasses.replace(answer.holding(DATA * 2), status=200, reason="OK"))


@pytest.mark.parametrize(
    "how",
    [
        pytest.param(shorten(1), id="short"),
        pytest.param(lengthen(1), id="long"),
        pytest.param(misplace(f"bytes 1-{len(DATA)}/{len(DATA) + 1}"), id="moved"),
        pytest.param(misplace(f"bytes 0-{len(DATA) - 1}/{len(DATA) + 1}"), id="of-another-size"),
        pytest.param(unrange, id="200"),
        pytest.param(whole, id="all"),
    ],
)
def test_an_answer_that_is_not_what_was_asked_for_is_an_error(
    store: S3Store, proxy: FaultProxy, how: Any
) -> None:
    proxy.faults(Fault(how, method="GET", path="/out/base"))
    with pytest.raises(StorageError, match=r"out/base: asked for bytes 0-262143/262144"):
        reading(store)


def test_a_file_replaced_between_two_tries_is_noticed(store: S3Store, proxy: FaultProxy) -> None:
    store.put("base", DATA)
    reader = store.open(store.look("base"))

    def cut_and_replace(exchange: Exchange) -> None:
        answer = exchange.answered()
        store.put("base", DATA[::-1])
        exchange.send_head(answer)
        exchange.send_body(answer.body[:100_000])
        exchange.hang_up()

    proxy.faults(Fault(cut_and_replace, method="GET", path="/out/base"))
    with pytest.raises(StorageError, match="out/base: the file changed while it was being merged"):
        reader.read(0, len(DATA))


# Writes through a bad connection


@pytest.mark.parametrize("how", [drop, lose_answer, say(500)])
def test_a_part_that_fails_once_is_sent_again(store: S3Store, proxy: FaultProxy, how: Any) -> None:
    proxy.faults(Fault(how, method="PUT", path="partNumber=2"))
    store.publish(written(store, "model"), "model", len(DATA))
    assert len(proxy.seen("PUT", "partNumber=2")) == 2
    assert store.get("model") == DATA


def test_parts_carry_a_checksum_and_are_hashed_once(store: S3Store, proxy: FaultProxy) -> None:
    written(store, "model")
    sent = proxy.seen("PUT", "partNumber")
    assert len(sent) == 4
    assert {"x-amz-checksum-crc32" in seen.headers for seen in sent} == {True}
    assert {seen.headers["x-amz-content-sha256"] for seen in sent} == {"UNSIGNED-PAYLOAD"}


def test_a_part_that_cannot_be_sent_is_an_error(
    store: S3Store, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy.faults(Fault(say(503), method="PUT", path="partNumber=2", times=None))
    part = store.start("model", len(DATA), "1-a")
    with pytest.raises(StorageError, match="out/model: the server failed however often"):
        part.write(memoryview(DATA), 0)
    part.discard()
    assert uploads(store.location) == []


@pytest.mark.parametrize("lost", [1, 3])
def test_a_lost_answer_to_the_publish_is_no_failure(
    store: S3Store, proxy: FaultProxy, lost: int
) -> None:
    part = written(store, "model")
    proxy.faults(Fault(lose_answer, method="POST", path="uploadId", times=lost))
    store.publish(part, "model", len(DATA))
    assert store.get("model") == DATA


@pytest.mark.parametrize("answer", ["NoSuchUpload", "PreconditionFailed"])
def test_a_publish_that_had_succeeded_is_known_again_on_servers_that_forget_uploads(
    store: S3Store, proxy: FaultProxy, answer: str
) -> None:
    part = written(store, "model")
    store.publish(part, "model", len(DATA))
    proxy.faults(Fault(refusal(404, answer), method="POST", path="uploadId"))
    store.publish(part, "model", len(DATA))
    proxy.faults(Fault(refusal(404, "NoSuchUpload"), method="GET", path="uploadId"))
    store.publish(part, "model", len(DATA))


def test_a_lost_answer_to_a_creation_is_no_failure(store: S3Store, proxy: FaultProxy) -> None:
    assert store.create("first", b"x")
    proxy.faults(Fault(lose_answer, method="PUT", path="/out/lease"))
    assert store.create("lease", b"mine")
    assert not store.create("lease", b"mine")


def test_a_creation_that_meets_another_is_tried_again(store: S3Store, proxy: FaultProxy) -> None:
    proxy.faults(Fault(refusal(409, "ConditionalRequestConflict"), method="PUT", path="/out/lease"))
    assert store.create("lease", b"mine")


def test_a_server_that_ignores_if_none_match_is_refused(store: S3Store, proxy: FaultProxy) -> None:
    proxy.faults(Fault(say(200, ETag='"1"'), method="PUT", path="/out/lease", skip=1))
    with pytest.raises(StorageError, match="ignores If-None-Match"):
        store.create("lease", b"mine")


# Copies


def test_an_unchanged_file_is_copied_by_the_server(
    store: S3Store, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "COPY_BYTES", 100_000)
    base = S3Store(store.location / "base")
    base.put("model", DATA)
    proxy.forget()
    part = store.copy(base.location, base.look("model"), "model", "1-a")
    assert [found.name for found in store.list()] == ["base/model"]
    store.publish(part, "model", len(DATA))
    passed = proxy.tally()
    assert (passed.received < 2000, passed.sent < 10_000) == (True, True)
    assert store.get("model") == DATA


def test_a_file_that_was_replaced_is_not_copied(store: S3Store) -> None:
    base = S3Store(store.location / "base")
    base.put("model", DATA)
    pinned = base.look("model")
    base.put("model", DATA[::-1])
    with pytest.raises(StorageError, match="base/model: the file changed"):
        store.copy(base.location, pinned, "model", "1-a")
    assert uploads(store.location) == []


# Memory


def test_a_writer_takes_about_two_parts_a_lane(s3: Location) -> None:
    part = S3Store(s3).start("model", 16 * len(DATA), "1-a")
    lanes, piece = 4, 30_000
    starts = iter(range(0, 16 * len(DATA), piece))
    data = memoryview(DATA * 16)

    def lane() -> None:
        for start in starts:  # an iterator of a range may be shared
            part.write(data[start : start + piece], start)

    with ThreadPoolExecutor(lanes) as threads:
        for running in [threads.submit(lane) for _ in range(lanes)]:
            running.result()
    part.finish()
    assert 1 <= len(part._spare) <= 2 * lanes
    assert part._gaps == {}
    assert {len(buffer) for buffer in part._spare} == {s3_parts.PART_BYTES}


@pytest.mark.parametrize(
    ("size", "expected"), [(1, 8 << 20), (80 << 30, 9 << 20), (5 << 40, 525 << 20)]
)
def test_parts_are_as_many_as_s3_takes(
    monkeypatch: pytest.MonkeyPatch, size: int, expected: int
) -> None:
    monkeypatch.undo()
    assert s3_parts.part_bytes(size) == expected
    assert -(-size // expected) <= s3_parts.MOST_PARTS
    assert expected >= 5 << 20, "less only of the last"


# What is said when it fails


def refusal(status: int, code: str, message: str = "no") -> Any:
    return say(status, f"<Error><Code>{code}</Code><Message>{message}</Message></Error>".encode())


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
    store: S3Store, proxy: FaultProxy, status: int, code: str, said: str
) -> None:
    proxy.faults(Fault(refusal(status, code), times=None))
    with pytest.raises(StorageError, match=rf"^s3://bucket-\d+/out/base: .*{said}.*[.] .+[.]$"):
        store.get("base")


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
    monkeypatch.setattr(s3_client, "ATTEMPTS", 1)
    access = Access(endpoint_url="http://127.0.0.1:9")
    with pytest.raises(StorageError, match="the server cannot be reached"):
        S3Store(dataclasses.replace(s3, access=access)).get("base")


def test_anonymous_reads_are_not_signed(store: S3Store, proxy: FaultProxy) -> None:
    access = dataclasses.replace(store.location.access, anonymous=True)
    with pytest.raises(StorageError):  # Swift would want a signature
        S3Store(dataclasses.replace(store.location, access=access)).get("base")
    assert {"authorization" in seen.headers for seen in proxy.seen()} == {False}


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


def test_secrets_are_in_no_error_log_or_pickle(
    store: S3Store, proxy: FaultProxy, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    written(store, "model")
    proxy.faults(
        Fault(refusal(403, "SignatureDoesNotMatch", f"{TOKEN} {SECRET}"), path="/out/base"),
        Fault(drop_within(10), path="/out/model", times=None),
        Fault(drop, times=None),
    )
    said = [repr(store), repr(store.start), pickle.dumps(store)]
    for name in ("base", "other"):
        with pytest.raises(RaymeldError) as caught:
            store.get(name)
        said += [str(caught.value), repr(caught.value), pickle.dumps(caught.value)]
    said += [record.getMessage() for record in caplog.records]
    text = "\n".join(str(one) for one in said)
    assert (TOKEN in text, SECRET in text, "Signature=" in text) == (False, False, False)

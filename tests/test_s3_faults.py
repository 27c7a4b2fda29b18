"""Reads and writes of S3 through a bad connection."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from backends import DATA, written
from fault_proxy import Exchange, Fault, FaultProxy
from network_faults import (
    drop,
    drop_within,
    edit,
    lengthen,
    lose_answer,
    misplace,
    say,
    shorten,
    stall,
    unrange,
)
from s3_server import refusal, uploads

from merge_core.errors import StorageError
from merge_core.stores import s3_client
from merge_core.stores.retries import STUBBORN
from merge_core.stores.s3 import S3Store


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
def test_a_read_that_fails_once_is_tried_again(
    s3_store: S3Store, s3_proxy: FaultProxy, how: Any
) -> None:
    s3_proxy.faults(Fault(how, method="GET", path="/out/base"))
    assert reading(s3_store) == DATA
    assert len(s3_proxy.seen("GET", "/out/base")) == 2


def test_what_is_left_of_a_block_is_asked_for_again_and_no_more(
    s3_store: S3Store, s3_proxy: FaultProxy
) -> None:
    s3_proxy.faults(Fault(drop_within(100_000), method="GET", path="/out/base", times=2))
    assert reading(s3_store) == DATA
    asked = [seen.headers["range"] for seen in s3_proxy.seen("GET", "/out/base")]
    assert asked == ["bytes=0-262143", "bytes=100000-262143", "bytes=200000-262143"]


def test_a_read_that_stalls_is_tried_again_soon(
    s3_store: S3Store, s3_proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_client, "STALL_SECONDS", 0.3)
    s3_proxy.faults(Fault(stall(100_000), method="GET", path="/out/base"))
    assert reading(s3_store) == DATA
    assert len(s3_proxy.seen("GET", "/out/base")) == 2


def test_a_read_that_never_comes_to_its_end_is_an_error(
    s3_store: S3Store, s3_proxy: FaultProxy
) -> None:
    s3_proxy.faults(Fault(drop_within(10), method="GET", path="/out/base", times=None))
    with pytest.raises(StorageError, match=r"out/base: the connection broke or stalled"):
        reading(s3_store)
    assert len(s3_proxy.seen("GET", "/out/base")) == STUBBORN.attempts


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
    s3_store: S3Store, s3_proxy: FaultProxy, how: Any
) -> None:
    s3_proxy.faults(Fault(how, method="GET", path="/out/base"))
    with pytest.raises(StorageError, match=r"out/base: asked for bytes 0-262143/262144"):
        reading(s3_store)


def test_a_server_that_knows_no_if_match_does_not_pass_another_file_off(
    s3_store: S3Store, s3_proxy: FaultProxy
) -> None:
    other = edit(lambda answer: answer.having("ETag", '"other"'))
    s3_proxy.faults(Fault(other, method="GET", path="/out/base"))
    with pytest.raises(StorageError, match="out/base: the file changed while it was being merged"):
        reading(s3_store)


def test_to_open_a_file_asks_nothing_that_its_reads_do_not_prove(
    s3_store: S3Store, s3_proxy: FaultProxy
) -> None:
    assert reading(s3_store) == DATA
    assert [one.method for one in s3_proxy.seen(path="/out/base")] == ["PUT", "HEAD", "GET"]


def test_a_file_replaced_between_two_tries_is_noticed(
    s3_store: S3Store, s3_proxy: FaultProxy
) -> None:
    s3_store.put("base", DATA)
    reader = s3_store.open(s3_store.look("base"))

    def cut_and_replace(exchange: Exchange) -> None:
        answer = exchange.answered()
        s3_store.put("base", DATA[::-1])
        exchange.send_head(answer)
        exchange.send_body(answer.body[:100_000])
        exchange.hang_up()

    s3_proxy.faults(Fault(cut_and_replace, method="GET", path="/out/base"))
    with pytest.raises(StorageError, match="out/base: the file changed while it was being merged"):
        reader.read(0, len(DATA))


@pytest.mark.parametrize("how", [drop, lose_answer, say(500)])
def test_a_part_that_fails_once_is_sent_again(
    s3_store: S3Store, s3_proxy: FaultProxy, how: Any
) -> None:
    s3_proxy.faults(Fault(how, method="PUT", path="partNumber=2"))
    s3_store.publish(written(s3_store, "model"), "model", len(DATA))
    assert len(s3_proxy.seen("PUT", "partNumber=2")) == 2
    assert s3_store.get("model") == DATA


def test_parts_carry_a_checksum_and_are_hashed_once(
    s3_store: S3Store, s3_proxy: FaultProxy
) -> None:
    written(s3_store, "model")
    sent = s3_proxy.seen("PUT", "partNumber")
    assert len(sent) == 4
    assert {"x-amz-checksum-crc32" in seen.headers for seen in sent} == {True}
    assert {seen.headers["x-amz-content-sha256"] for seen in sent} == {"UNSIGNED-PAYLOAD"}


def test_a_part_that_cannot_be_sent_is_an_error(
    s3_store: S3Store, s3_proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3_proxy.faults(Fault(say(503), method="PUT", path="partNumber=2", times=None))
    part = s3_store.start("model", len(DATA), "1-a")
    with pytest.raises(StorageError, match="out/model: the server failed however often"):
        part.write(memoryview(DATA), 0)
    part.discard()
    assert uploads(s3_store.location) == []


@pytest.mark.parametrize("lost", [1, 3])
def test_a_lost_answer_to_the_publish_is_no_failure(
    s3_store: S3Store, s3_proxy: FaultProxy, lost: int
) -> None:
    part = written(s3_store, "model")
    s3_proxy.faults(Fault(lose_answer, method="POST", path="uploadId", times=lost))
    s3_store.publish(part, "model", len(DATA))
    assert s3_store.get("model") == DATA


@pytest.mark.parametrize("answer", ["NoSuchUpload", "PreconditionFailed"])
def test_a_publish_that_had_succeeded_is_known_again_on_servers_that_forget_uploads(
    s3_store: S3Store, s3_proxy: FaultProxy, answer: str
) -> None:
    part = written(s3_store, "model")
    s3_store.publish(part, "model", len(DATA))
    s3_proxy.faults(Fault(refusal(404, answer), method="POST", path="uploadId"))
    s3_store.publish(part, "model", len(DATA))
    s3_proxy.faults(Fault(refusal(404, "NoSuchUpload"), method="GET", path="uploadId"))
    s3_store.publish(part, "model", len(DATA))


def test_a_lost_answer_to_a_creation_is_no_failure(s3_store: S3Store, s3_proxy: FaultProxy) -> None:
    assert s3_store.create("first", b"x")
    s3_proxy.faults(Fault(lose_answer, method="PUT", path="/out/lease"))
    assert s3_store.create("lease", b"mine")
    assert not s3_store.create("lease", b"mine")


def test_a_creation_that_meets_another_is_tried_again(
    s3_store: S3Store, s3_proxy: FaultProxy
) -> None:
    s3_proxy.faults(
        Fault(refusal(409, "ConditionalRequestConflict"), method="PUT", path="/out/lease")
    )
    assert s3_store.create("lease", b"mine")


def test_a_server_that_ignores_if_none_match_is_refused(
    s3_store: S3Store, s3_proxy: FaultProxy
) -> None:
    s3_proxy.faults(Fault(say(200, ETag='"1"'), method="PUT", path="/out/lease", skip=1))
    with pytest.raises(StorageError, match="ignores If-None-Match"):
        s3_store.create("lease", b"mine")

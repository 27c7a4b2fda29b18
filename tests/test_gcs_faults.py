"""Reads and writes of GCS through a bad connection: obstore's retries, and ours around them."""

from __future__ import annotations

import datetime as dt
from typing import Any

import pytest
from backends import DATA, written
from fault_proxy import Exchange, Fault, FaultProxy, pass_on
from gcs_server import Gcs
from network_faults import (
    drop,
    drop_within,
    edit,
    ignore_range,
    keep_answer,
    lengthen,
    lose_answer,
    misplace,
    say,
    shorten,
    stall,
    unrange,
)

from merge_core.errors import StorageError
from merge_core.stores import gcs_client
from merge_core.stores.gcs import GcsStore


def reading(store: GcsStore) -> bytes:
    """A file put there and read in one range."""
    store.put("base", DATA)
    reader = store.open(store.look("base"))
    data = bytes(reader.read(0, len(DATA)))
    reader.close()
    return data


BASE = "/out%2Fbase"


@pytest.mark.parametrize(
    "how",
    [
        pytest.param(drop, id="dropped"),
        pytest.param(drop_within(100_000), id="cut"),
        pytest.param(say(503), id="503"),
        pytest.param(say(500), id="500"),
        pytest.param(say(429), id="429"),
    ],
)
def test_a_read_that_fails_once_is_tried_again(
    gs_store: GcsStore, gs_proxy: FaultProxy, how: Any
) -> None:
    gs_proxy.faults(Fault(how, method="GET", path=BASE))
    assert reading(gs_store) == DATA
    assert len(gs_proxy.seen("GET", BASE)) == 2


def test_what_is_left_of_a_block_is_asked_for_again_and_no_more(
    gs_store: GcsStore, gs_proxy: FaultProxy
) -> None:
    gs_proxy.faults(Fault(drop_within(100_000), method="GET", path=BASE, times=2))
    assert reading(gs_store) == DATA
    asked = [seen.headers["range"] for seen in gs_proxy.seen("GET", BASE)]
    assert asked == ["bytes=0-262143", "bytes=100000-262143", "bytes=200000-262143"]


@pytest.mark.parametrize("after", [None, 100_000])
def test_a_read_that_stalls_is_tried_again_soon(
    gs_store: GcsStore, gs_proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch, after: int | None
) -> None:
    monkeypatch.setattr(gcs_client, "STALL_TIME", dt.timedelta(seconds=0.3))
    gs_proxy.faults(Fault(stall(after), method="GET", path=BASE))
    assert reading(gs_store) == DATA
    assert len(gs_proxy.seen("GET", BASE)) == 2


PARTIAL = "the store failed: Generic GCS error: Received non-partial response"


@pytest.mark.parametrize(
    ("how", "said"),
    [
        pytest.param(shorten(1), "asked for bytes 0-262143, .* with 262143 bytes", id="short"),
        pytest.param(lengthen(1), "asked for bytes 0-262143, .* with 262145 bytes", id="long"),
        pytest.param(
            misplace(f"bytes 1-{len(DATA)}/{len(DATA) + 1}"),
            "the store failed: Generic GCS error: Requested 0..262144, got 1..262145",
            id="moved",
        ),
        pytest.param(unrange, PARTIAL, id="200"),
        pytest.param(ignore_range, PARTIAL, id="all"),
    ],
)
def test_an_answer_that_is_not_what_was_asked_for_is_an_error(
    gs_store: GcsStore, gs_proxy: FaultProxy, how: Any, said: str
) -> None:
    gs_proxy.faults(Fault(how, method="GET", path=BASE))
    with pytest.raises(StorageError, match=f"out/base: {said}"):
        reading(gs_store)


def test_a_read_that_is_refused_however_often_is_an_error(
    gs_store: GcsStore, gs_proxy: FaultProxy
) -> None:
    gs_proxy.faults(Fault(say(429), method="GET", path=BASE, times=None))
    with pytest.raises(StorageError, match=r"out/base: the store failed: .*429"):
        reading(gs_store)
    assert len(gs_proxy.seen("GET", BASE)) == 11


def test_a_server_that_knows_no_if_match_does_not_pass_another_file_off(
    gs_store: GcsStore, gs_proxy: FaultProxy
) -> None:
    other = edit(lambda answer: answer.having("ETag", '"other"'))
    gs_proxy.faults(Fault(other, method="GET", path=BASE))
    with pytest.raises(StorageError, match="out/base: the file changed while it was being merged"):
        reading(gs_store)


def test_a_file_replaced_between_two_tries_is_noticed(
    gs_store: GcsStore, gs_proxy: FaultProxy
) -> None:
    gs_store.put("base", DATA)
    reader = gs_store.open(gs_store.look("base"))

    def cut_and_replace(exchange: Exchange) -> None:
        answer = exchange.answered()
        gs_store.put("base", DATA[::-1])
        exchange.send_head(answer)
        exchange.send_body(answer.body[:100_000])
        exchange.hang_up()

    gs_proxy.faults(Fault(cut_and_replace, method="GET", path=BASE))
    with pytest.raises(StorageError, match="out/base: "):
        reader.read(0, len(DATA))


@pytest.mark.parametrize("how", [drop, lose_answer, keep_answer, say(500), say(429), say(503)])
@pytest.mark.parametrize("method", ["PUT", "GET", "HEAD", "DELETE"])
def test_a_request_for_a_small_file_that_fails_once_is_tried_again(
    gs_store: GcsStore,
    gs_proxy: FaultProxy,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    how: Any,
) -> None:
    monkeypatch.setattr(gcs_client, "STALL_TIME", dt.timedelta(seconds=0.3))
    gs_proxy.faults(Fault(how, method=method, path="/out%2Fsmall"))
    gs_store.put("small", b"x")
    assert gs_store.look("small").size == 1
    assert gs_store.get("small") == b"x"
    gs_store.delete("small")
    assert len([one for one in gs_proxy.seen(method) if one.faulty]) == 1


@pytest.mark.parametrize("how", [lose_answer, keep_answer, drop, say(503), say(429)])
def test_a_lost_answer_to_a_creation_is_no_failure(
    gs_store: GcsStore, gs_proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch, how: Any
) -> None:
    monkeypatch.setattr(gcs_client, "STALL_TIME", dt.timedelta(seconds=0.3))
    gs_proxy.faults(Fault(how, method="PUT", path="/out%2Flease"))
    assert gs_store.create("lease", b"mine")
    assert not gs_store.create("lease", b"yours")
    assert gs_store.get("lease") == b"mine"


def test_a_server_that_ignores_the_condition_of_a_creation_is_refused(
    gs_store: GcsStore, gcs: Gcs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gcs, "ignores_conditions", True)
    with pytest.raises(StorageError, match="ignores x-goog-if-generation-match"):
        gs_store.create("lease", b"mine")


@pytest.mark.parametrize("how", [drop, say(503), say(429)])
def test_an_upload_is_begun_again_where_it_was_not(
    gs_store: GcsStore, gs_proxy: FaultProxy, how: Any
) -> None:
    gs_proxy.faults(Fault(how, method="POST", path="uploads"))
    gs_store.publish(written(gs_store, "model"), "model", len(DATA))
    assert gs_store.get("model") == DATA


def test_an_upload_whose_beginning_is_never_answered_is_an_error_and_swept(
    gs_store: GcsStore, gs_proxy: FaultProxy, gcs: Gcs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gcs_client, "STALL_TIME", dt.timedelta(seconds=0.3))
    gs_proxy.faults(Fault(keep_answer, method="POST", path="uploads"))
    part = gs_store.start("model", len(DATA), "1-a")
    part.write(memoryview(DATA), 0)
    with pytest.raises(StorageError, match="parts/model/1-a: the store failed: "):
        part.finish()
    part.discard()
    assert len(gcs.uploads_of(gs_store.location.root)) == 1
    gs_store.sweep("model")
    assert gcs.uploads_of(gs_store.location.root) == {}
    assert list(gs_store.list()) == []


def test_an_upload_of_which_nobody_heard_is_swept(
    gs_store: GcsStore, gs_proxy: FaultProxy, gcs: Gcs
) -> None:
    gs_proxy.faults(Fault(lose_answer, method="POST", path="uploads"))
    gs_store.publish(written(gs_store, "model"), "model", len(DATA))
    assert gs_store.get("model") == DATA
    assert len(gcs.uploads_of(gs_store.location.root)) == 1
    gs_store.sweep("model")
    assert gcs.uploads_of(gs_store.location.root) == {}
    assert [one.name for one in gs_store.list()] == ["model"]


@pytest.mark.parametrize("how", [drop, lose_answer, say(500)])
def test_a_chunk_that_fails_once_is_sent_again(
    gs_store: GcsStore, gs_proxy: FaultProxy, how: Any
) -> None:
    gs_proxy.faults(Fault(how, method="PUT", path="partNumber=2"))
    gs_store.publish(written(gs_store, "model"), "model", len(DATA))
    assert len(gs_proxy.seen("PUT", "partNumber=2")) == 2
    assert gs_store.get("model") == DATA


def test_a_chunk_that_stalls_is_sent_again(
    gs_store: GcsStore, gs_proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gcs_client, "STALL_TIME", dt.timedelta(seconds=0.3))
    gs_proxy.faults(Fault(stall(), method="PUT", path="partNumber=2"))
    gs_store.publish(written(gs_store, "model"), "model", len(DATA))
    assert gs_store.get("model") == DATA


def test_a_chunk_that_cannot_be_sent_is_an_error_and_leaves_no_upload(
    gs_store: GcsStore, gs_proxy: FaultProxy, gcs: Gcs
) -> None:
    gs_proxy.faults(Fault(say(400), method="PUT", path="partNumber=2", times=None))
    part = gs_store.start("model", len(DATA), "1-a")
    part.write(memoryview(DATA), 0)
    with pytest.raises(StorageError, match="parts/model/1-a: the store failed"):
        part.finish()
    part.discard()
    assert gcs.uploads_of(gs_store.location.root) == {}


@pytest.mark.parametrize("lost", [1, 3])
@pytest.mark.parametrize("how", [lose_answer, keep_answer])
def test_a_lost_answer_to_the_completion_of_a_part_is_no_failure(
    gs_store: GcsStore, gs_proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch, how: Any, lost: int
) -> None:
    monkeypatch.setattr(gcs_client, "STALL_TIME", dt.timedelta(seconds=0.3))
    gs_proxy.faults(Fault(how, method="POST", path="uploadId", times=lost))
    gs_store.publish(written(gs_store, "model"), "model", len(DATA))
    assert gs_store.get("model") == DATA


def copies(how: Any, passing: int = 0) -> Any:
    """Only with requests to copy, after so many."""
    met = iter(range(1000))

    def only(exchange: Exchange) -> None:
        copied = "x-goog-copy-source" in exchange.seen.headers
        (how if copied and next(met) >= passing else pass_on)(exchange)

    return only


@pytest.mark.parametrize("how", [lose_answer, keep_answer, drop, say(503), say(429)])
def test_a_publish_whose_answer_is_lost_is_no_failure(
    gs_store: GcsStore, gs_proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch, how: Any
) -> None:
    monkeypatch.setattr(gcs_client, "STALL_TIME", dt.timedelta(seconds=0.3))
    part = written(gs_store, "model")
    gs_proxy.faults(Fault(copies(how), method="PUT", path="/out%2Fmodel"))
    gs_store.publish(part, "model", len(DATA))
    assert gs_store.get("model") == DATA
    assert [one.name for one in gs_store.list()] == ["model"]


def test_a_token_that_is_no_longer_good_is_an_error_that_says_so(
    gs_store: GcsStore, gcs: Gcs
) -> None:
    gs_store.put("a", b"x")
    gcs.tokens.clear()
    with pytest.raises(StorageError, match="out/a: the credentials are not accepted"):
        gs_store.get("a")

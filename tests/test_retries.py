"""Each request has its own tries, whatever others do, and pauses that pass over an outage."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from backends import names
from fault_proxy import Fault, FaultProxy, How
from network_faults import drop, say
from s3_server import refusal

from merge_core.errors import StorageError
from merge_core.stores.retries import PATIENT, STUBBORN, Retries
from merge_core.stores.s3 import S3Store


def test_pauses_grow_and_are_as_long_as_the_server_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr("time.sleep", slept.append)
    monkeypatch.setattr("random.uniform", lambda low, high: (low + high) / 2)
    retries = Retries(attempts=9, first_pause=1.0, longest_pause=4.0, longest_asked=60.0)
    for failed in range(1, 5):
        retries.pause(failed)
    retries.pause(1, asked=30.0)
    retries.pause(1, asked=1000.0)
    assert slept == [0.75, 1.5, 3.0, 3.0, 30.0, 60.0]


@pytest.mark.parametrize(
    ("retries", "least", "most"), [(PATIENT, 7.75, 15.5), (STUBBORN, 45.75, 91.5)]
)
def test_all_pauses_together_are_as_long_as_an_outage(
    retries: Retries, least: float, most: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    for of, expected in ((min, least), (max, most)):
        monkeypatch.setattr("random.uniform", lambda *ends, of=of: of(ends))
        assert sum(retries.seconds(n) for n in range(1, retries.attempts)) == expected


@pytest.mark.parametrize("how", [drop, say(503)])
def test_of_many_requests_that_fail_together_each_has_all_its_tries(
    s3_store: S3Store, s3_proxy: FaultProxy, how: How
) -> None:
    """96 times; botocore has a budget for some 35 retries."""
    keys = {f"{number:02}" for number in range(24)}
    s3_proxy.faults(*(Fault(how, method="PUT", path=f"/out/{key}$", times=4) for key in keys))
    with ThreadPoolExecutor(len(keys)) as threads:
        list(threads.map(lambda key: s3_store.put(key, b"x"), keys))
    assert names(s3_store) == keys
    assert len(s3_proxy.seen("PUT")) == 5 * len(keys)


@pytest.mark.parametrize("how", [drop, say(500), say(429), refusal(400, "RequestTimeout")])
def test_a_request_that_always_fails_is_tried_so_often_and_no_more(
    s3_store: S3Store, s3_proxy: FaultProxy, how: How
) -> None:
    s3_store.put("base", b"x")
    s3_proxy.faults(Fault(how, method="GET", path="/out/base", times=None))
    with pytest.raises(StorageError):
        s3_store.get("base")
    assert len(s3_proxy.seen("GET")) == STUBBORN.attempts


def test_a_server_that_never_answered_is_given_up_sooner(
    s3_store: S3Store, s3_proxy: FaultProxy
) -> None:
    s3_proxy.faults(Fault(drop, times=None))
    with pytest.raises(StorageError, match="the connection broke"):
        s3_store.get("base")
    assert len(s3_proxy.seen()) == PATIENT.attempts


@pytest.mark.parametrize("how", [refusal(403, "AccessDenied"), refusal(501, "NotImplemented")])
def test_what_does_not_pass_is_not_tried_again(
    s3_store: S3Store, s3_proxy: FaultProxy, how: How
) -> None:
    s3_proxy.faults(Fault(how, times=None))
    with pytest.raises(StorageError):
        s3_store.get("base")
    assert len(s3_proxy.seen()) == 1


def test_a_server_that_wants_to_be_asked_later_is(
    s3_store: S3Store, s3_proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, float]] = []

    def seconds(_: Retries, *failed_and_asked: float) -> float:
        asked.append(failed_and_asked)  # type: ignore[arg-type]
        return 0.0

    monkeypatch.setattr(Retries, "seconds", seconds)
    slow = say(503, b"<Error><Code>SlowDown</Code></Error>", Retry_After="7")
    s3_proxy.faults(Fault(slow, method="PUT", times=2))
    s3_store.put("base", b"x")
    assert asked == [(1, 7.0), (2, 7.0)]

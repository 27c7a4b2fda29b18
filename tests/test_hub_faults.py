"""What the network does to reads from the hub: the right bytes come, or a clear error."""

from __future__ import annotations

import mmap
import random
from collections.abc import Iterator

import pytest
from fault_proxy import Fault, FaultProxy, How
from hub_client import QUICK, HubClient
from hub_server import Hub
from network_faults import (
    drop,
    drop_within,
    flip,
    ignore_range,
    lengthen,
    lose_answer,
    misplace,
    say,
    shorten,
    stall,
    trickle,
    unrange,
)

from merge_core.errors import StorageError
from merge_core.stores import blocks
from merge_core.stores.hub import HubStore
from merge_core.stores.location import locate
from merge_core.stores.store import Reader

SIZE = 300_000
WEIGHTS = random.Random(1).randbytes(SIZE)
FIRST, COUNT = 1000, 200_000
FAULTS: dict[str, How] = {
    "dropped before": drop,
    "dropped within": drop_within(70_000),
    "answer lost": lose_answer,
    "stalled": stall(),
    "stalled within": stall(70_000),
    "503": say(503, b"busy", Retry_After="0"),
    "429": say(429, b"slow down", RateLimit='"resolvers";r=0;t=0'),
    "shorter": shorten(10),
    "longer": lengthen(10),
    "another range": misplace(f"bytes 0-{COUNT - 1}/{SIZE}"),
    "of another size": misplace(f"bytes {FIRST}-{FIRST + COUNT - 1}/{SIZE + 1}"),
    "200": unrange,
    "200 and all of it": ignore_range,
}


@pytest.fixture
def proxy(hub: Hub, client: HubClient) -> Iterator[FaultProxy]:
    hub.repo("org/base", {"config.json": b'{"a": 1}', "model.safetensors": WEIGHTS})
    with FaultProxy(hub.address) as running:
        client.use(running.address)
        yield running


@pytest.fixture(autouse=True)
def impatience(request: pytest.FixtureRequest, client: HubClient) -> None:
    """Only where something stalls: a busy machine may be slow."""
    if "stall" in request.node.name or "slow" in request.node.name:
        client.wait_at_most(0.4)


def store() -> HubStore:
    return HubStore(locate("hf://org/base"), retries=QUICK)


def opened() -> Reader:
    return store().open(store().look("model.safetensors"))


def read(reader: Reader) -> bytes:
    buffer = memoryview(mmap.mmap(-1, COUNT + 8192))
    return bytes(reader.read_into(buffer, FIRST, COUNT))


@pytest.mark.parametrize("how", FAULTS.values(), ids=FAULTS)
def test_a_range_is_right_after_two_faults(proxy: FaultProxy, how: How) -> None:
    reader = opened()
    proxy.faults(Fault(how, path="^/cdn/", times=2))
    assert read(reader) == WEIGHTS[FIRST : FIRST + COUNT]
    assert [one.faulty for one in proxy.seen(path="^/cdn/")] == [True, True, False]


@pytest.mark.parametrize("how", FAULTS.values(), ids=FAULTS)
def test_a_fault_that_stays_is_an_error_after_three_attempts(proxy: FaultProxy, how: How) -> None:
    reader = opened()
    proxy.faults(Fault(how, path="^/cdn/", times=None))
    with pytest.raises(StorageError, match=r"^hf://org/base@\w{40}/model.safetensors: ") as raised:
        read(reader)
    said = "3 times in a row. Try again later, or name a mirror in HF_ENDPOINT"
    assert said in str(raised.value)
    assert "signature" not in str(raised.value)
    assert len(proxy.seen(path="^/cdn/")) == 3


def test_what_came_before_a_cut_is_not_asked_for_again(proxy: FaultProxy) -> None:
    reader = opened()
    proxy.faults(Fault(drop_within(150_000), path="^/cdn/", times=1))
    assert read(reader) == WEIGHTS[FIRST : FIRST + COUNT]
    ranges = [one.headers["range"] for one in proxy.seen(path="^/cdn/")]
    start = int(ranges[1].removeprefix("bytes=").partition("-")[0])
    assert FIRST < start <= FIRST + 150_000
    assert ranges == [f"bytes={n}-{FIRST + COUNT - 1}" for n in (FIRST, start)]


def test_a_slow_answer_is_waited_for_while_it_comes(proxy: FaultProxy) -> None:
    reader = opened()
    proxy.faults(Fault(trickle(COUNT // 8, 0.08), path="^/cdn/"))  # longer than it waits for a byte
    assert read(reader) == WEIGHTS[FIRST : FIRST + COUNT]
    assert len(proxy.seen(path="^/cdn/")) == 1


def test_an_address_that_expired_is_asked_for_again(proxy: FaultProxy, hub: Hub) -> None:
    reader = opened()
    assert read(reader) == WEIGHTS[FIRST : FIRST + COUNT]
    assert read(reader) == WEIGHTS[FIRST : FIRST + COUNT]
    hub.expire()
    proxy.forget()
    assert read(reader) == WEIGHTS[FIRST : FIRST + COUNT]
    assert [one.status for one in proxy.seen()] == [403, 302, 206]
    assert "authorization" not in proxy.seen(path="^/cdn/")[0].headers


def test_an_address_that_never_serves_is_an_error(proxy: FaultProxy) -> None:
    reader = opened()
    proxy.faults(Fault(say(403), path="^/cdn/", times=None))
    with pytest.raises(StorageError, match="address that the hub gave has expired, 3 times in a r"):
        read(reader)


def test_a_long_read_is_several_requests(
    proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 30_000)
    reader = opened()
    proxy.faults(Fault(drop_within(100), path="^/cdn/", skip=1, times=2))
    assert read(reader) == WEIGHTS[FIRST : FIRST + COUNT]
    asked = [one.headers["range"].removeprefix("bytes=") for one in proxy.seen(path="^/cdn/")]
    starts = sorted(int(one.partition("-")[0]) for one in asked)
    size = -(-COUNT // 7)
    assert len(asked) == 7 + 2
    assert {FIRST + n * size for n in range(7)} < set(starts)
    proxy.faults(Fault(drop, path="^/cdn/", skip=3, times=None))
    with pytest.raises(StorageError, match="3 times in a row"):
        read(reader)


def test_what_cannot_be_fetched_into_the_cache_is_said(proxy: FaultProxy) -> None:
    cached = HubStore(locate("hf://org/base"), retries=QUICK)
    pinned = cached.look("model.safetensors")
    proxy.faults(Fault(drop, method="HEAD", times=None))
    with pytest.raises(StorageError, match=r"cannot be reached .*HF_HUB_OFFLINE=1 takes what is"):
        cached.fetch(pinned)
    proxy.faults(Fault(say(403), path="^/cdn/", times=None))
    with pytest.raises(StorageError, match="the hub answered 403"):
        cached.fetch(pinned)


@pytest.mark.parametrize("route", ["/api/models/org/base/revision/", "/tree/", "/resolve/"])
@pytest.mark.parametrize(
    "how",
    [drop, stall(), say(503), say(429, Retry_After="0")],
    ids=["drop", "stall", "503", "429"],
)
def test_the_hub_itself_is_asked_again(proxy: FaultProxy, route: str, how: How) -> None:
    proxy.faults(Fault(how, path=route, times=2))
    assert store().get("config.json") == b'{"a": 1}'
    assert read(opened()) == WEIGHTS[FIRST : FIRST + COUNT]


def test_a_small_file_that_arrives_changed_is_got_again(proxy: FaultProxy) -> None:
    proxy.faults(Fault(flip(3), path="config.json", times=2))
    assert store().get("config.json") == b'{"a": 1}'
    proxy.faults(Fault(flip(3), path="config.json", times=None))
    with pytest.raises(StorageError, match=r"config.json: what the hub sends is damaged"):
        store().get("config.json")


def test_a_hub_that_has_another_file_at_the_commit_is_not_believed(
    proxy: FaultProxy, hub: Hub
) -> None:
    """As after a mirror was set up wrong; a commit of the hub itself never changes."""
    reader = opened()
    repo = hub.repos["org/base"]
    repo.commits[repo.refs["main"]]["model.safetensors"] = bytes(SIZE)
    with pytest.raises(StorageError, match="another file there than the one that was planned"):
        read(reader)

"""``--cache``: whole files of the hub, once a machine, in huggingface_hub's own cache."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fault_proxy import Fault, FaultProxy
from handmade import (
    FACTORS,
    GEOMETRY,
    TWO_LANES,
    published,
    random_tensors,
    write_adapter,
    write_base,
)
from hub_client import HubClient
from hub_repos import sha256
from hub_server import Hub
from network_faults import drop_within
from typer.testing import CliRunner

from cluster.cli import app
from merge_core.errors import StorageError
from merge_core.merge import merge
from merge_core.model_card import CARD
from merge_core.plan import MergePlan
from merge_core.planner import make_plan
from merge_core.stores import cache_room
from merge_core.stores.hub import HubStore
from merge_core.stores.location import Access, locate

BIG = 9 << 20
"""Bytes of a side file that is read in pieces."""


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    base = write_base(tmp_path / "base", random_tensors(GEOMETRY), GEOMETRY.config, files=3)
    (base / "merges.txt").write_bytes(b"x" * BIG)
    return base, write_adapter(tmp_path / "adapter", FACTORS, r=4, lora_alpha=8)


@pytest.fixture
def proxy(
    hub: Hub, client: HubClient, folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> Any:
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
    for path in folders:
        hub.repo(f"org/{path.name}", {file.name: file.read_bytes() for file in path.iterdir()})
    with FaultProxy(hub.address) as running:
        client.use(running.address)
        yield running


@pytest.fixture
def expected(folders: tuple[Path, Path], tmp_path: Path) -> dict[str, bytes]:
    merge(make_plan(folders[0], [folders[1]], shard_bytes=18_000), tmp_path / "local")
    return results(tmp_path / "local")


def results(out: Path) -> dict[str, bytes]:
    return {name: data for name, data in published(out).items() if name != CARD}


def planned(*, cache: bool = True, adapter: str = "hf://org/adapter") -> MergePlan:
    access = Access(cache=cache)
    return make_plan("hf://org/base", [adapter], shard_bytes=18_000, access=access)


def cached(client: HubClient) -> set[str]:
    return {path.name for path in client.cache.rglob("snapshots/*/*")}


def ranges(proxy: FaultProxy) -> list[str]:
    return [one.target for one in proxy.seen("GET") if "range" in one.headers]


def whole(proxy: FaultProxy) -> list[str]:
    """Files that were sent whole, by the addresses that the hub refers to."""
    cdn = proxy.seen("GET", "^/cdn/")
    return sorted(one.target for one in cdn if "range" not in one.headers)


def test_a_second_merge_asks_for_nothing_that_the_first_one_fetched(
    proxy: FaultProxy, client: HubClient, expected: dict[str, bytes], tmp_path: Path
) -> None:
    plan = planned()
    assert not {name for name in cached(client) if name.endswith(".safetensors")}  # headers alone
    assert len(ranges(proxy)) >= 4
    proxy.forget()

    merge(plan, tmp_path / "one", choice=TWO_LANES)

    assert results(tmp_path / "one") == expected
    weights = {f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)}
    assert weights | {"adapter_model.safetensors", "merges.txt"} <= cached(client)
    assert (len(whole(proxy)), ranges(proxy)) == (4, [])
    proxy.forget()

    merge(planned(), tmp_path / "two", choice=TWO_LANES)

    assert results(tmp_path / "two") == expected
    assert [one.target for one in proxy.seen() if "/resolve/" in one.target] == []
    assert (whole(proxy), ranges(proxy)) == ([], [])


def test_without_it_only_ranges_are_asked_for(
    proxy: FaultProxy, client: HubClient, expected: dict[str, bytes], tmp_path: Path
) -> None:
    merge(planned(cache=False), tmp_path / "one", choice=TWO_LANES)
    assert results(tmp_path / "one") == expected
    assert (cached(client), whole(proxy)) == (set(), [])


def test_the_flag_is_for_the_base_alone_too_and_plan_fetches_no_weights(
    proxy: FaultProxy,
    client: HubClient,
    folders: tuple[Path, Path],
    expected: dict[str, bytes],
    tmp_path: Path,
) -> None:
    words = ["hf://org/base", str(folders[1]), "--cache", "--shard-size", "18kB"]
    for command in (["plan", *words], ["recipe", *words, "--out", str(tmp_path / "out")]):
        done = CliRunner().invoke(app, command)
        assert done.exit_code == 0, done.output
        assert not {name for name in cached(client) if name.endswith(".safetensors")}
    assert "\ncache: true" in done.stdout
    done = CliRunner().invoke(
        app, ["merge", *words, "--out", str(tmp_path / "out"), "--address", "inline"]
    )
    assert done.exit_code == 0, done.output
    assert results(tmp_path / "out") == expected
    assert len(whole(proxy)) == 3
    assert "cache" not in (tmp_path / "out" / ".raymeld" / "recipe.yaml").read_text()


def test_two_who_want_the_same_file_fetch_it_once(
    proxy: FaultProxy, client: HubClient, expected: dict[str, bytes], tmp_path: Path
) -> None:
    plan = planned()
    proxy.forget()
    merges = [
        threading.Thread(target=merge, args=(plan, tmp_path / name), kwargs={"choice": TWO_LANES})
        for name in ("one", "two")
    ]
    for one in merges:
        one.start()
    for one in merges:
        one.join()
    assert results(tmp_path / "one") == results(tmp_path / "two") == expected
    assert (len(whole(proxy)), ranges(proxy)) == (4, [])


def test_a_transfer_that_breaks_off_is_continued(
    proxy: FaultProxy, client: HubClient, expected: dict[str, bytes], tmp_path: Path
) -> None:
    plan = planned()
    proxy.faults(Fault(drop_within(1000), method="GET", path="^/cdn/"))
    proxy.forget()
    merge(plan, tmp_path / "one", choice=TWO_LANES)
    assert results(tmp_path / "one") == expected
    assert len(proxy.seen("GET", "^/cdn/")) == 4 + 1


def test_room_is_looked_for_before_anything_is_fetched(
    proxy: FaultProxy, client: HubClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, usage = planned(), shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10_000))
    proxy.forget()
    with pytest.raises(StorageError, match=r"no room: [\d,]+ bytes are to come, 10,000 are free"):
        merge(plan, tmp_path / "one", choice=TWO_LANES)
    assert proxy.seen("GET", "/resolve/|^/cdn/") == []


def test_room_is_needed_only_for_what_is_still_to_come(
    proxy: FaultProxy,
    client: HubClient,
    folders: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = HubStore(locate("hf://org/base", Access(cache=True)))
    file = next(store.look(one.name) for one in store.list() if one.name.endswith("safetensors"))
    content, usage = (folders[0] / file.name).read_bytes(), shutil.disk_usage(folders[0])
    full = SimpleNamespace(disk_usage=lambda _: usage._replace(free=file.size - 1))
    monkeypatch.setattr(cache_room, "shutil", full)  # the library has its own eyes, and only warns
    with pytest.raises(StorageError, match="no room"):
        store.fetch(file)

    begun = client.cache / "models--org--base" / "blobs" / f"{sha256(content)}.incomplete"
    begun.parent.mkdir(parents=True, exist_ok=True)
    begun.write_bytes(content[:100])
    assert store.fetch(file).read_bytes() == content

"""Whatever dies in the middle of an upload to S3: no object that is not whole and accepted, and the
same bytes in the end as on a disk, with no upload and no part left behind.

Who dies is who sent a request that the proxy holds, so it is always in the middle of it.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from typing import Any

import kills
import pytest
from aftermath import KEPT, actors_of
from clusters import NOTICED_AT_ONCE, cluster, environment
from fault_proxy import Exchange, Fault, FaultProxy
from handmade import Geometry, published, random_factors, random_tensors, write_adapter, write_base
from head import until
from network_faults import client, heard, kill, node, unheard
from s3_server import ENVIRONMENT, uploads

from cluster.driver import merge_on_ray
from cluster.workers import ClusterOptions
from merge_core.merge import merge
from merge_core.model_card import CARD
from merge_core.output import accepted_shards
from merge_core.plan import MergePlan
from merge_core.planner import make_plan
from merge_core.stores import s3_parts
from merge_core.stores.location import Access, Location
from merge_core.stores.opening import open_store

MARK = "raymeld-test-kills-in-s3"
SHARD_BYTES = 12_600_000
"""Two parts of S3 each, as they are in earnest."""


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> MergePlan:
    """Four shards of two parts each."""
    folder, geometry = (
        tmp_path_factory.mktemp("kills"),
        Geometry(hidden=512, inner=256, vocab=9000, layers=10),
    )
    factors = random_factors(geometry.linear, dict.fromkeys(geometry.linear, 2))
    base = write_base(folder / "base", random_tensors(geometry), geometry.config)
    adapter = write_adapter(folder / "adapter", factors, r=2, lora_alpha=4)
    plan = make_plan(base, [adapter], shard_bytes=SHARD_BYTES)
    parts = [-(-shard.size // s3_parts.PART_BYTES) for shard in plan.shards]
    assert parts == [2, 2, 2, 2]
    return plan


@pytest.fixture(scope="module")
def expected(small: MergePlan, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("inline") / "out"
    merge(small, out)
    return {name: data for name, data in published(out).items() if name != CARD}


@pytest.fixture(scope="module")
def nodes() -> Iterator[Any]:
    """A head that holds no worker, and three nodes for one each."""
    with (
        environment(RAYMELD_TEST=MARK, **ENVIRONMENT),
        cluster(cpus=0, system=NOTICED_AT_ONCE) as started,
    ):
        for _ in range(3):
            started.add_node(num_cpus=1)
        yield started


@pytest.fixture
def out(s3: Location, s3_proxy: FaultProxy) -> Location:
    """Where to merge to, through the proxy."""
    return Location(
        scheme="s3", root=s3.root, path="out", access=Access(endpoint_url=s3_proxy.address)
    )


def assert_whole_and_accepted(out: Location, expected: dict[str, bytes]) -> None:
    """Whatever has a final key, before the merge is done."""
    store = open_store(out)
    there = {one.name for one in store.list() if one.name.endswith(".safetensors")}
    assert {name: store.get(name) for name in there} == {name: expected[name] for name in there}
    assert len(there) <= len(accepted_shards(out))
    assert "config.json" not in {one.name for one in store.list()}


def assert_done(out: Location, expected: dict[str, bytes], proxy: FaultProxy) -> None:
    """Complete, each shard of one upload, and nothing besides; S3 counts parts by their uploads."""
    store = open_store(out)
    names = {one.name for one in store.list()}
    left = {name for name in names if name.startswith(".raymeld/")}
    assert {n: store.get(n) for n in names - left - {CARD}} == expected
    states = {name.removeprefix(".raymeld/") for name in left} - KEPT
    assert {name for name in states if not re.match(r"(lease|runs)/[^/]*\.json$", name)} == set()
    completed = {one.target for one in proxy.seen("POST", "uploadId") if one.status == 200}
    assert len(completed) == len([name for name in expected if name.endswith(".safetensors")])
    assert uploads(out) == []


def shard(number: int, query: str) -> str:
    return rf"/out/model-{number:05}-of-[0-9]+[.]safetensors[?].*{query}"


def test_a_worker_a_node_or_a_collector_that_dies_in_an_upload_leaves_nothing_of_it(
    small: MergePlan, expected: dict[str, bytes], nodes: Any, out: Location, s3_proxy: FaultProxy
) -> None:
    def half(exchange: Exchange) -> None:
        exchange.half_asked()
        assert_whole_and_accepted(out, expected)

    deaths = [
        Fault(kill(client, half), method="PUT", path=shard(1, "partNumber=1")),
        Fault(kill(client, heard), method="PUT", path=shard(3, "partNumber=2")),
        Fault(kill(client, heard), method="POST", path=shard(4, "uploads")),
        Fault(kill(node, half), method="PUT", path=shard(2, "partNumber=2")),
        Fault(kill(client, unheard), method="POST", path=shard(1, "uploadId=")),
        Fault(kill(client, heard), method="POST", path=shard(3, "uploadId=")),
    ]
    s3_proxy.faults(*deaths)
    options = ClusterOptions(address=nodes.address, device="cpu", workers=2)
    said: list[str] = []

    result = merge_on_ray(small, out, options, watch=lambda _: None, say=said.append)

    assert len([one for one in s3_proxy.seen() if one.faulty]) == len(deaths), said
    assert sum("after failure" in line for line in said) == 4, said
    assert sum("starting another collector" in line for line in said) == 2, said
    assert [receipt.shard for receipt in result.receipts] == [0, 1, 2, 3]
    assert_done(out, expected, s3_proxy)


def test_a_driver_that_dies_in_an_upload_leaves_what_the_same_command_finishes(
    small: MergePlan, expected: dict[str, bytes], nodes: Any, out: Location, s3_proxy: FaultProxy
) -> None:
    words: list[Any] = ["merge", small.base, small.adapters[0].path, "--out", out, "--workers", 2]
    words += ["--shard-size", f"{SHARD_BYTES}B", "--device", "cpu", "--address", nodes.address]
    words += ["--endpoint-url", s3_proxy.address]
    drivers: list[subprocess.Popen[str]] = []

    def driver(_: Exchange) -> list[int]:
        return [drivers[-1].pid]

    for death in (
        Fault(kill(driver, Exchange.half_asked), method="PUT", path=shard(2, "partNumber=1")),
        Fault(kill(driver, heard), method="POST", path=shard(3, "uploadId=")),
        None,
    ):
        s3_proxy.faults(*([death] if death else []))
        with subprocess.Popen(
            kills.command([], *words), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            drivers.append(process)
            _, said = process.communicate()
        assert process.returncode == (-9 if death else 0), said
        until(lambda: not actors_of(MARK))
        if death:
            assert_whole_and_accepted(out, expected)
    assert_done(out, expected, s3_proxy)

"""What a merge is said to take: values by hand, and what must always hold."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from actors.events import ItemDone, WorkerReady
from cluster import estimate as module
from cluster.backlog import Item
from cluster.cli import app
from cluster.commands import Assign, Start
from cluster.crew import WorkerKind
from cluster.estimate import Estimate, Machines, estimate
from cluster.options import bytes_a_second, node_counts
from cluster.schedule import Schedule
from cluster.tasks import MERGING, VERIFYING
from merge_core.errors import InputError
from merge_core.layout import TensorSpec
from merge_core.plan import AdapterInput, MergePlan, Shard, Source, TensorTask
from merge_core.stores.store import FileIdentity
from merge_core.updates import DoraUpdate, Factor, LowRankUpdate
from merge_core.updates.combined import Combination

GB = 1_000_000_000
SLOW = Machines(nodes=1, network=1e8)
"""So slow that nothing but its network counts."""


def spec(*shape: int, item: int = 2) -> TensorSpec:
    dtype = {2: "BF16", 4: "F32"}[item]
    size = item * shape[0] * shape[1]
    return TensorSpec(name="t", dtype=dtype, shape=shape, offset=0, nbytes=size)


def factor(*shape: int) -> Factor:
    return Factor(tensor=spec(*shape, item=4))


def plan_of(rows: Sequence[int], rank: int = 0) -> MergePlan:
    """A shard of one bfloat16 tensor of [rows, 1000] for each of ``rows``, and an adapter."""
    update = LowRankUpdate(
        adapter=0, a=factor(rank, 1000), b=factor(1, rank), scaling=1, transposed=False
    )
    shards = []
    for n, count in enumerate(rows):
        tensor = spec(count, 1000)
        updates = (replace(update, b=factor(count, rank)),) if rank else ()
        task = TensorTask(target=tensor, source=Source(tensor=tensor, file=0), updates=updates)
        shards.append(Shard(index=n, name=f"{n}", size=tensor.nbytes, tasks=(task,)))
    file = FileIdentity(name="adapter", size=50_000_000, pin="0")
    adapter = AdapterInput(
        path=Path("lora"), weight=1, file=file, config_file=file, digests={}, peft_type="LORA"
    )
    return MergePlan(
        base=Path("base"),
        base_files=(),
        header_digests=(),
        config={},
        config_changes={},
        stored_head=None,
        side_files=(),
        card="",
        recipe={},
        adapters=(adapter,),
        twins=(),
        keep_tied=False,
        combination=Combination(),
        added=(),
        shards=tuple(shards),
        stage=frozenset(range(len(shards))),
        notes=(),
    )


FIXED = 5.0 + 0.5 + 0.5 + 0.05 / 1.5
"""Start, commit, and the driver's look at 50 MB of adapter, which come at 0.1 GB/s."""

MERGE = 0.03 + 10.0 + 0.08388608
"""A shard of 1 GB at 0.1 GB/s, of which the last 8 MiB are written when nothing is left to read."""

CHECK = 0.03 + 10.0


@pytest.mark.parametrize(
    ("machines", "level", "nodes", "working"),
    [
        (SLOW, "structure", 1, 3 * MERGE + 3 * 0.03),
        (SLOW, "digest", 1, 3 * MERGE + 3 * CHECK),
        (SLOW, "load", 1, 3 * MERGE + 3 * CHECK),
        (SLOW, "numeric", 1, 3 * MERGE + 3 * (0.03 + 30)),
        (replace(SLOW, nodes=2), "digest", 2, 2 * MERGE + CHECK),
        (replace(SLOW, nodes=2), "numeric", 2, 2 * MERGE + 2 * (0.03 + 30)),
        (replace(SLOW, nodes=9), "digest", 3, MERGE + CHECK),
        (replace(SLOW, nodes=9, storage=1e8), "digest", 3, 90.0),
        (replace(SLOW, nodes=2, workers=2, network=2e8), "structure", 2, MERGE + 0.03),
    ],
)
def test_three_shards_take_what_they_take_by_hand(
    machines: Machines, level: str, nodes: int, working: float
) -> None:
    found = estimate(plan_of([500_000] * 3), machines, level)

    assert found.seconds == pytest.approx(FIXED + working)
    assert found.nodes == nodes
    assert found.node_hours == pytest.approx(nodes * (FIXED + working) / 3600)


def test_factors_are_read_and_multiplied() -> None:
    found = estimate(plan_of([500_000], rank=100), SLOW, "structure")
    factors = 4 * 100 * (1000 + 500_000)
    assert found.seconds == pytest.approx(FIXED + MERGE + factors / 1e8 + 0.03)

    found = estimate(plan_of([500_000], rank=2_000), replace(SLOW, network=1e12), "structure")
    product = 2 * 2_000 * 500_000_000 / 200e9  # on four cores
    assert found.seconds == pytest.approx(
        5.5 + 0.05 / 1.5 + 1 / 2.2 + product + 2 * 0.03, abs=0.001
    )
    assert found.bottleneck == "arithmetic"


@pytest.mark.parametrize(("transposed", "passes"), [(False, 1), (True, 2)])
def test_a_base_is_read_twice_where_dora_takes_the_norms_of_columns(
    transposed: bool, passes: int
) -> None:
    plan = plan_of([500_000], rank=1)
    (shard,) = plan.shards
    (task,) = shard.tasks
    (delta,) = task.updates
    assert isinstance(delta, LowRankUpdate)
    magnitude = spec(1, 1, item=4)
    dora = DoraUpdate(delta=replace(delta, transposed=transposed), magnitude=magnitude, weight=1.0)
    plan = replace(plan, shards=(replace(shard, tasks=(replace(task, updates=(dora,)),)),))

    factors = 4 * (1000 + 500_000 + 1)
    seconds = FIXED + MERGE + 10 * (passes - 1) + factors / 1e8 + 0.03
    assert estimate(plan, SLOW, "structure").seconds == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("machines", "bottleneck"),
    [
        (SLOW, "network of the nodes"),
        (replace(SLOW, nodes=3, storage=2e8), "storage"),
        (replace(SLOW, network=1e12, device="cuda"), "start, handing over and commit"),
    ],
)
def test_the_slowest_part_is_named(machines: Machines, bottleneck: str) -> None:
    assert estimate(plan_of([500_000] * 3), machines, "digest").bottleneck == bottleneck


def test_ten_thousand_receipts_take_their_time_whatever_the_cluster() -> None:
    plan = plan_of([1] * 10_000)
    assert estimate(plan, replace(SLOW, nodes=5_000), "structure").seconds > 100


@given(
    rows=st.lists(st.integers(1, 1_000_000), min_size=1, max_size=30),
    nodes=st.integers(1, 20),
    workers=st.integers(1, 4),
    network=st.floats(1e6, 1e11),
    storage=st.none() | st.floats(1e6, 1e12),
    level=st.sampled_from(["structure", "digest", "numeric", "load"]),
)
def test_more_nodes_are_never_slower_and_no_byte_travels_for_nothing(
    rows: list[int], nodes: int, workers: int, network: float, storage: float | None, level: str
) -> None:
    plan = plan_of(rows, rank=4)
    described = Machines(nodes=nodes, workers=workers, network=network)
    if storage is not None:
        described = replace(described, storage=storage)
    found = estimate(plan, described, level)

    assert found.nodes <= nodes
    more, faster = replace(described, nodes=nodes + 1), replace(described, network=2 * network)
    assert estimate(plan, more, level).seconds <= found.seconds * (1 + 1e-9)
    assert estimate(plan, faster, level).seconds <= found.seconds * (1 + 1e-9)
    size = sum(shard.size for shard in plan.shards)
    inwards = {"structure": 1, "numeric": 4}.get(level, 2) * size
    assert found.node_hours * 3600 * network >= inwards * (1 - 1e-9)
    assert found.seconds * described.storage >= (inwards + size) * (1 - 1e-9)


@pytest.mark.parametrize("workers", [1, 2, 8, 50, 64, 82])
def test_the_schedule_hands_out_as_the_estimate_says(workers: int) -> None:
    """Equal workers, the 72B's shards: its layers, embeddings and head."""
    sizes = [2 * GB + 491 * GB // 1000, *[GB + 745 * GB // 1000] * 80, 2 * GB + 491 * GB // 1000]
    schedule = Schedule([WorkerKind(name="cpu", most=workers, ceiling=workers)])
    schedule.extend({n: Item(size=size, rank=MERGING) for n, size in enumerate(sizes)})
    commands, due, clock = schedule.look(0), [], 0.0
    while True:
        due += [
            (clock + sizes[one.item % 82] / 1e9, one.worker, one.item)
            for one in commands
            if isinstance(one, Assign)
        ]
        started = [one.worker for one in commands if isinstance(one, Start)]
        if started:
            ready = [WorkerReady(worker=n) for n in started]
            commands = [c for event in ready for c in schedule.handle(event, clock)]
            continue
        if not due:
            break
        clock, worker, item = due.pop(due.index(min(due)))
        if item < 82:
            schedule.extend({item + 82: Item(size=sizes[item], rank=VERIFYING)})
        commands = schedule.handle(ItemDone(worker=worker, item=item), clock)
    assert schedule.finished
    items = tuple(module._Item(read=size, busy=0.0) for size in sorted(sizes, reverse=True))
    run = module._Run(workers=workers, merges=items, checks=items, waits=False, adapters=0)
    assert clock == pytest.approx(run.seconds(module._Pace(network=1e9, storage=1e12, hands=1e9)))


@pytest.mark.parametrize(
    ("text", "wanted"), [("10Gbit/s", 1.25e9), ("1.25 GB/s", 1.25e9), ("800kB/s", 8e5)]
)
def test_a_bandwidth_is_read(text: str, wanted: float) -> None:
    assert bytes_a_second(text, "--node-bandwidth") == wanted


@pytest.mark.parametrize("text", ["10", "10GB", "10Gb/s", "0GB/s", "-1GB/s", "1" * 20 + "GB/s", ""])
def test_what_is_no_bandwidth_is_refused(text: str) -> None:
    with pytest.raises(InputError, match=r"--node-bandwidth: .* is no bandwidth"):
        bytes_a_second(text, "--node-bandwidth")


@pytest.mark.parametrize("text", ["", "0", "1,", "1,,2", "one", "-1", "1.5", "1" * 7])
def test_what_are_no_nodes_is_refused(text: str) -> None:
    assert node_counts("64,1,8,8") == [1, 8, 64]
    with pytest.raises(InputError, match="is no list of nodes"):
        node_counts(text)


def plan_command(plan: MergePlan, *words: str) -> Any:
    done = CliRunner().invoke(app, ["plan", str(plan.base), str(plan.adapters[0].path), *words])
    assert done.exit_code == 0, done.output
    return done.stdout


def test_plan_estimates_one_node_and_says_what_it_assumes(small: MergePlan) -> None:
    *_, line, assuming = plan_command(small).splitlines()

    assert line.startswith("estimate 1 node  6 seconds  0.00 node-hours  slowest: start,")
    assert assuming == (
        "assuming 1 CPU worker a node, 1.25 GB/s each way to the storage;"
        " nodes that are up; verified: digest"
    )


def test_plan_estimates_what_it_is_asked_for_in_json_too(small: MergePlan) -> None:
    words = ["--nodes=100,1", "--workers-per-node=2", "--device=cuda", "--shard-size=18000"]
    words += ["--node-bandwidth=100Gbit/s", "--storage-bandwidth=5GB/s", "--verify=numeric"]
    text = plan_command(small, *words).splitlines()
    one, many = json.loads(plan_command(small, *words, "--json"))["estimates"]

    assert text[-2].startswith(f"estimate 100 nodes, {-(-len(small.shards) // 2)} of use")
    assert text[-1].startswith(
        "assuming 2 GPU workers a node, 12.5 GB/s each way to the storage, 5 GB/s in all"
    )
    described = Machines(nodes=1, workers=2, network=12.5e9, storage=5e9, device="cuda")
    wanted: Estimate = estimate(small, described, "numeric")
    assert (one["nodes"], many["nodes"]) == (1, 100)
    assert (one["seconds"], one["node_hours"]) == (wanted.seconds, wanted.node_hours)
    assert one["storage_bytes_per_second"] == 5e9

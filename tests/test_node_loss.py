"""Nodes that vanish, that are told to go, and that run out of memory: the merge ends right."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import faults
import psutil
import pytest
import ray
from aftermath import assert_tidy
from clusters import NOTICED_AT_ONCE, cluster, environment, joined, until_gone
from handmade import published
from head import until
from kills import Kill, classes, marked

from actors.kept_collector import KeptCollector
from actors.merger import Merger
from cluster import policies
from cluster.driver import merge_on_ray
from cluster.session import session
from cluster.workers import ClusterOptions
from merge_core.errors import RaymeldError
from merge_core.merge import merge
from merge_core.plan import MergePlan
from merge_core.progress import Progress
from merge_core.stores.location import locate

ROOM = 3 << 30
"""Bytes that everything else on this machine may take before Ray's monitor would kill too much."""


@pytest.fixture(scope="module")
def nodes() -> Iterator[Any]:
    """A head that holds no worker, and two nodes for one each; a test brings the fourth."""
    faults.by_value()
    with cluster(cpus=0, system=NOTICED_AT_ONCE) as started:
        started.add_node(num_cpus=1)
        started.add_node(num_cpus=1)
        yield started


@pytest.fixture(scope="module")
def expected(small: MergePlan, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("inline") / "out"
    merge(small, out)
    return published(out)


@pytest.fixture(autouse=True)
def _nobody_is_a_straggler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or whoever waits for the end of its node would get company on a busy machine."""
    monkeypatch.setattr(policies, "STRAGGLER_SECONDS", math.inf)


def run(plan: MergePlan, out: Path, nodes: Any, **actors: type) -> list[str]:
    """Merge with three workers, one a node, and return everything that was said."""
    said: list[str] = []
    options = ClusterOptions(address=nodes.address, device="cpu", workers=3, **actors)
    merge_on_ray(plan, out, options, watch=lambda _: None, say=said.append)
    assert_tidy(out)
    return said


def test_what_a_node_that_vanishes_was_at_goes_to_another(
    small: MergePlan, expected: dict[str, bytes], nodes: Any, tmp_path: Path
) -> None:
    """One while it proves what an earlier run did, one while it merges, one while it verifies."""
    out = tmp_path / "out"
    stop_after(small, out, shards=2)
    places = [
        ("before actors.checker:check_file", "model-00001"),
        ("after merge_core.storage:PartFile.write_small", ""),
        ("after actors.checker:check_file", "model-00004"),
    ]
    deaths = [Kill(victim="raylet", place=place, about=about) for place, about in places]
    ahead = marked(deaths, tmp_path / "marks")
    for _ in ahead:
        nodes.add_node(num_cpus=1)

    said = run(small, out, nodes, **classes(ahead))

    assert [kill for kill in ahead if not kill.happened] == []
    assert published(out) == expected
    assert sum("after failure 1 of 20" in line for line in said) == len(ahead), said
    for node in list(nodes.worker_nodes):
        if any(kind == "raylet" for kind, _ in node.dead_processes()):
            nodes.remove_node(node, allow_graceful=False)


def stop_after(plan: MergePlan, out: Path, shards: int) -> None:
    """Leave an unfinished merge there."""
    done = sum(shard.size for shard in plan.shards[:shards])

    def watch(progress: Progress) -> None:
        if progress.done > done:
            raise RaymeldError("stopped")

    with pytest.raises(RaymeldError, match="stopped"):
        merge(plan, out, watch=watch)


def test_a_node_that_cannot_be_reached_is_replaced_and_what_it_does_later_counts_for_nothing(
    small: MergePlan, expected: dict[str, bytes], nodes: Any, tmp_path: Path
) -> None:
    """Its raylet is stopped, as by a network that breaks; the worker there goes on."""
    lost = nodes.add_node(num_cpus=1, labels={"spot": "yes"})
    raylet = psutil.Process(lost.all_processes["raylet"][0].process.pid)
    there = [raylet, *raylet.children(recursive=True)]

    said = run(small, tmp_path / "out", nodes, merger=faults.OnAStoppedNode)

    assert published(tmp_path / "out") == expected
    (retry,) = [line for line in said if "after failure 1 of 20" in line]
    late = (tmp_path / "late").read_text()
    assert late.startswith(retry.split()[1]), retry
    there += raylet.children(recursive=True)
    raylet.resume()
    until(lost.dead_processes)  # and so reaped: its children look for it
    until_gone(there)
    assert published(tmp_path / "out") == expected
    nodes.remove_node(lost, allow_graceful=False)


@pytest.mark.parametrize(
    ("merger", "seconds", "decision"),
    [(faults.TerminatedInTime, 1000, "gets nothing after"), (faults.Terminated, 4, "gives back")],
    ids=["enough time", "too little time"],
)
def test_a_node_that_is_terminated_drains_and_costs_nothing(
    small: MergePlan,
    expected: dict[str, bytes],
    nodes: Any,
    tmp_path: Path,
    merger: type[Merger],
    seconds: int,
    decision: str,
) -> None:
    """As Kubernetes ends a pod, and systemd a service."""
    patience = {"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": str(seconds)}
    with joined(nodes.address, cpus=1, label="spot=yes", **patience) as node:
        everything = [node, *node.children(recursive=True)]

        said = run(small, tmp_path / "out", nodes, merger=merger)

        assert published(tmp_path / "out") == expected
        assert any(decision in line and "its node is going" in line for line in said), said
        assert not any("failure" in line for line in said), said
        until_gone(everything)


def test_a_node_that_is_drained_costs_nothing(
    small: MergePlan, expected: dict[str, bytes], nodes: Any, tmp_path: Path
) -> None:
    """As ``raymeld spot-notice`` has it."""
    spot = nodes.add_node(num_cpus=1, labels={"spot": "yes"})

    said = run(small, tmp_path / "out", nodes, merger=faults.CannotFinish)

    assert published(tmp_path / "out") == expected
    assert any("gives back" in line and "its node is going" in line for line in said), said
    assert not any("failure" in line for line in said), said
    until(spot.dead_processes)
    nodes.remove_node(spot, allow_graceful=False)


def test_the_collector_is_on_the_drivers_node_whatever_others_there_are(
    small: MergePlan, nodes: Any, tmp_path: Path
) -> None:
    with session(nodes.address, use_gpus=False):
        collector = KeptCollector(small, locate(tmp_path), "run", faults.TellsItsNode)

        assert collector.call("node") == ray.get_runtime_context().get_node_id()


def test_a_worker_that_rays_memory_monitor_kills_counts_as_an_error(
    small: MergePlan, expected: dict[str, bytes], nodes: Any, tmp_path: Path
) -> None:
    """Only the node of the worker that eats looks at memory, from what is used just now."""
    memory = psutil.virtual_memory()
    threshold = (memory.total - memory.available + ROOM) / memory.total
    assert threshold < 1, "too little memory is free for this test"
    monitor = {"threshold": str(threshold), "refresh_ms": "100"}
    with environment(
        RAY_memory_usage_threshold=monitor["threshold"],
        RAY_memory_monitor_refresh_ms=monitor["refresh_ms"],
    ):
        tight = nodes.add_node(num_cpus=1, labels={"spot": "yes"})

    said = run(small, tmp_path / "out", nodes, merger=faults.EatsMemory)

    assert published(tmp_path / "out") == expected
    retries = [line for line in said if "failure" in line]
    assert len(retries) == 1, said
    assert "after failure 1 of 3" in retries[0]
    assert "memory" in retries[0]
    nodes.remove_node(tight)

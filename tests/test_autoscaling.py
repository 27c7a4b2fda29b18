"""Ray's own autoscaler: nodes come because a merge waits for them, and go when it has ended."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import faults
import pytest
import ray
from autoscaler import autoscaling_cluster
from handmade import published, small_merge
from head import until

from actors.pool import launching
from cluster import loop, patience, policies
from cluster.driver import merge_on_ray
from cluster.workers import ClusterOptions
from merge_core.errors import RaymeldError
from merge_core.merge import merge


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    faults.by_value()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        with autoscaling_cluster(cpus=2, most=2) as at:
            yield at


def nodes_up(address: str) -> int:
    """Besides the head."""
    ray.init(address=address, log_to_driver=False, logging_level="error")
    try:
        return sum(node["Alive"] for node in ray.nodes()) - 1
    finally:
        ray.shutdown()


def test_asking_what_is_launched_connects_to_no_ray_of_others(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)

    assert launching() == ""
    assert not ray.is_initialized()


def test_a_merge_grows_the_cluster_from_no_node_and_nodes_leave_before_it_ends(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = small_merge(tmp_path / "inputs")
    merge(plan, tmp_path / "reference")
    monkeypatch.setattr(patience, "SAY_SECONDS", 0.0)
    monkeypatch.setattr(policies, "STRAGGLER_SECONDS", 1000.0)  # the last shard is held up
    said: list[str] = []
    assert nodes_up(address) == 0

    merge_on_ray(
        plan,
        tmp_path / "out",
        ClusterOptions(address=address, device="cpu", workers=2, merger=faults.UntilANodeLeft),
        watch=lambda _: None,
        say=said.append,
    )

    assert published(tmp_path / "out") == published(tmp_path / "reference")
    assert "workers: at most 2 on cpu, each with 2 CPU" in said
    assert "waiting for 2 x {2 CPU}; 2 nodes launching" in said
    until(lambda: nodes_up(address) == 0)


def test_without_any_gpu_a_merge_goes_on_with_the_cpu_workers_beside_them(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = small_merge(tmp_path / "inputs")
    merge(plan, tmp_path / "reference")
    said: list[str] = []
    options = ClusterOptions(
        address=address, device="cuda", workers=3, cpu_workers=1, merger=faults.UntilGivenUp
    )
    passed = [0.0]

    def say(line: str) -> None:
        """Half an hour goes by once the first worker is up."""
        said.append(line)
        if " is cpu on " in line:
            passed[0] = options.start_timeout

    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + passed[0])
    monkeypatch.setattr(loop, "time", clock)

    merge_on_ray(plan, tmp_path / "out", options, watch=lambda _: None, say=say)

    assert published(tmp_path / "out") == published(tmp_path / "reference")
    (given_up,) = [line for line in said if line.startswith("going on without cuda workers: ")]
    assert "no worker came up in 1800 s: waiting for 3 x {1 GPU}" in given_up


def test_a_worker_that_no_node_comes_for_ends_the_merge(address: str, tmp_path: Path) -> None:
    plan = small_merge(tmp_path / "inputs")
    options = ClusterOptions(address=address, device="cpu", workers=1, start_timeout=0.0)

    with pytest.raises(RaymeldError, match=r"no worker came up in 0 s: waiting for \d x \{2 CPU\}"):
        merge_on_ray(plan, tmp_path / "out", options, watch=lambda _: None, say=lambda _: None)
    assert not (tmp_path / "out" / "config.json").exists()

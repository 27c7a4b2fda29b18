"""Ray's own autoscaler: nodes come because a merge waits for them, and go when it has ended."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from autoscaler import autoscaling_cluster
from handmade import published, small_merge

from cluster.driver import merge_on_ray
from cluster.workers import ClusterOptions
from merge_core.errors import RaymeldError
from merge_core.merge import merge


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
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


def test_a_merge_grows_the_cluster_from_no_node_and_leaves_none(
    address: str, tmp_path: Path
) -> None:
    plan = small_merge(tmp_path / "inputs")
    merge(plan, tmp_path / "reference")
    said: list[str] = []
    assert nodes_up(address) == 0

    merge_on_ray(
        plan,
        tmp_path / "out",
        ClusterOptions(address=address, device="cpu", workers=2),
        watch=lambda _: None,
        say=said.append,
    )

    assert published(tmp_path / "out") == published(tmp_path / "reference")
    assert "workers: at most 2 on cpu, each with 2 CPU" in said
    end = time.monotonic() + 60
    while nodes_up(address):
        assert time.monotonic() < end


def test_a_worker_that_no_node_comes_for_ends_the_merge(address: str, tmp_path: Path) -> None:
    plan = small_merge(tmp_path / "inputs")
    options = ClusterOptions(address=address, device="cpu", workers=1, start_timeout=0.0)

    with pytest.raises(RaymeldError, match=r"no worker came up in 0 s: waiting for \d x \{2 CPU\}"):
        merge_on_ray(plan, tmp_path / "out", options, watch=lambda _: None, say=lambda _: None)
    assert not (tmp_path / "out" / "config.json").exists()

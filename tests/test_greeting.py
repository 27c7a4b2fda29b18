"""What workers say first, on a real Ray: who they are and what they found there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import faults
import pytest
import torch
from clusters import running_cluster
from handmade import published

from actors.events import WorkerReady
from actors.identity import identify
from actors.pool import Pool, WorkerOptions
from cluster.driver import merge_on_ray
from cluster.session import session
from cluster.workers import ClusterOptions
from merge_core.merge import merge
from merge_core.output import prepare
from merge_core.plan import MergePlan
from merge_core.stores.location import locate


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    faults.by_value()
    with running_cluster(cpus=2) as at:
        yield at


def test_a_worker_says_who_it_is_where_and_what_is_free(
    small: MergePlan, address: str, tmp_path: Path
) -> None:
    from actors.merger import Merger
    from merge_core.factors import seal

    plan, out = seal(small), locate(tmp_path / "out")
    prepare(out, plan)
    kind = WorkerOptions(device="cpu", resources={"num_cpus": 1, "num_gpus": 0})
    with session(address, use_gpus=False):
        pool = Pool(identify(), [kind], Merger, (plan, out))
        pool.start(0, "cpu", 0)
        while not pool.greetings:
            assert all(isinstance(event, WorkerReady) for event in pool.next_events(10))
        (greeting,) = pool.greetings.values()
        pool.close()

    us = identify()
    assert greeting.identity.pid != us.pid
    assert greeting.identity.difference(us) is None
    assert (greeting.device, greeting.memory.device) == ("cpu", None)
    assert greeting.memory.host > 0
    assert greeting.choice.startswith("8 lanes of 8 MiB reads need")
    assert len(greeting.node) == 56
    assert torch.__version__ == greeting.identity.torch
    assert str(greeting).startswith(f"cpu on {us.host}, process {greeting.identity.pid}: 8 lanes")


def test_a_device_that_is_too_full_is_reported_and_left_alone(
    small: MergePlan, address: str, tmp_path: Path
) -> None:
    merge(small, tmp_path / "inline")
    said: list[str] = []
    options = ClusterOptions(address=address, workers=2, merger=faults.FullOnce)

    merge_on_ray(small, tmp_path / "out", options, watch=lambda _: None, say=said.append)

    assert published(tmp_path / "out") == published(tmp_path / "inline")
    (left,) = [line for line in said if "is left alone" in line]
    assert "one lane needs 2 MB of memory, found free: 1 MB of memory" in left
    assert not any("retrying" in line or "failed" in line for line in said), said

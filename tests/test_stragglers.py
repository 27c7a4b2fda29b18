"""A worker that never comes to an end holds nothing up: another one gets its shard as well."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import faults
import psutil
import pytest
from aftermath import assert_tidy
from clusters import running_cluster
from handmade import published
from head import until

from actors.merger import Merger
from cluster import policies
from cluster.driver import merge_on_ray
from cluster.workers import ClusterOptions
from merge_core.merge import merge
from merge_core.plan import MergePlan


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    faults.by_value()
    with running_cluster(cpus=2) as at:
        yield at


@pytest.mark.parametrize("merger", [faults.Hangs, faults.Stopped])
def test_the_shard_of_a_straggler_is_given_to_a_second_worker_and_the_first_is_ended(
    small: MergePlan,
    address: str,
    tmp_path: Path,
    merger: type[Merger],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    merge(small, tmp_path / "reference")
    monkeypatch.setattr(policies, "STRAGGLER_SECONDS", 1.0)
    options = ClusterOptions(address=address, device="cpu", workers=2, merger=merger)
    said: list[str] = []

    result = merge_on_ray(small, tmp_path / "out", options, watch=lambda _: None, say=said.append)

    assert published(tmp_path / "out") == published(tmp_path / "reference")
    assert_tidy(tmp_path / "out")
    name, first = small.shards[0].name, result.receipts[0].worker
    (given,) = [line for line in said if line.startswith(f"giving {name} to a second worker")]
    straggler = given.partition("beside ")[2].partition(":")[0]
    assert f"{straggler} is let go: {first} was first with {name}" in said
    assert " s, where " in given
    assert result.receipts[0].attempt == 2
    pid = int((tmp_path / "hangs").read_text())
    until(lambda: not psutil.pid_exists(pid))

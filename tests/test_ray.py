"""The merge on a real Ray: the same bytes as inline, whatever dies on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import faults
import pytest
import ray
from clusters import running_cluster
from models import assert_same_tensors, make_adapter, make_base, oracle, read_tensors
from moe import write_expert_adapter, write_fused_adapter
from tuners import make_tuned

from actors import kept_collector
from actors.kept_collector import KeptCollector
from actors.lifeline import Lifeline
from actors.merger import Merger
from actors.pool import Pool
from cluster import driver
from cluster.driver import merge_on_ray
from cluster.session import session
from cluster.workers import ClusterOptions
from merge_core.errors import InputError, LeaseLostError, RaymeldError
from merge_core.merge import merge
from merge_core.plan import MergePlan
from merge_core.planner import make_plan
from merge_core.progress import Progress
from merge_core.stages import shards_of
from merge_core.stores.location import locate


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    faults.by_value()
    with running_cluster() as at:
        yield at


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> MergePlan:
    where = tmp_path_factory.mktemp("ray")
    base = make_base(where / "base", shard="100KB", num_hidden_layers=3)
    adapter = make_adapter(where / "adapter", base)
    return make_plan(base, [adapter], shard_bytes=60_000)


@pytest.fixture(scope="module")
def expected(plan: MergePlan, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What the inline merge writes; bit-identical to PEFT."""
    out = tmp_path_factory.mktemp("inline") / "out"
    merge(plan, out)
    assert_same_tensors(read_tensors(out), oracle(plan.base.local, plan.adapters[0].path.local))
    return published(out)


def published(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}


def run(
    plan: MergePlan, out: Path, address: str, *, workers: int = 2, **classes: type
) -> list[str]:
    """Merge and return everything that was said."""
    said: list[str] = []
    options = ClusterOptions(address=address, workers=workers, **classes)
    merge_on_ray(plan, out, options, watch=lambda _: None, say=said.append)
    return said


@pytest.mark.parametrize("workers", [1, 4])
def test_any_number_of_workers_writes_the_bytes_of_the_inline_merge(
    plan: MergePlan, expected: dict[str, bytes], address: str, tmp_path: Path, workers: int
) -> None:
    assert len(plan.shards) >= 4

    run(plan, tmp_path / "out", address, workers=workers)

    assert published(tmp_path / "out") == expected


def test_stages_on_a_cluster_end_in_the_bytes_of_one_merge(
    plan: MergePlan, expected: dict[str, bytes], address: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    for layers in ("1", "rest"):
        run(replace(plan, stage=shards_of(plan.shards, layers)), out, address)
        assert not (out / "config.json").exists()

    said = run(replace(plan, stage=shards_of(plan.shards, "0,2")), out, address)

    assert published(out) == expected
    assert f"{len(plan.shards) - 2} of {len(plan.shards)} shards were there and are proven" in said


@pytest.mark.parametrize("fused", [False, True])
def test_experts_are_merged_to_the_bytes_of_the_inline_merge(
    fused: bool, moe: Callable[..., Path], address: str, tmp_path: Path
) -> None:
    one = write_fused_adapter(tmp_path / "1", moe(), swapped=False, peft_version="0.21.0")
    two = write_expert_adapter(tmp_path / "2", moe(), ["up_proj"], lora_alpha=6)
    plan = make_plan(moe(fused=fused), [one, f"{two}@0.5"], shard_bytes=60_000)
    merge(plan, tmp_path / "inline")

    run(plan, tmp_path / "out", address)

    assert published(tmp_path / "out") == published(tmp_path / "inline")


def test_what_peft_merges_is_merged_by_the_workers_to_the_same_bytes(
    plan: MergePlan, address: str, tmp_path: Path
) -> None:
    adapter = make_tuned(tmp_path / "adapter", plan.base.local, "VERA")
    tuned = make_plan(plan.base, [adapter], shard_bytes=60_000)
    merge(tuned, tmp_path / "inline")

    run(tuned, tmp_path / "out", address)

    assert published(tmp_path / "out") == published(tmp_path / "inline")


@pytest.mark.parametrize(
    ("merger", "reason"),
    [
        (
            faults.FailsTwice,
            "retrying model-00002-of-00005.safetensors after failure 2 of 3",
        ),
        (faults.LiesAboutItsWork, "was made from plan 000000000000"),
    ],
)
def test_a_shard_that_fails_is_merged_again(
    plan: MergePlan,
    expected: dict[str, bytes],
    address: str,
    tmp_path: Path,
    merger: type[Merger],
    reason: str,
) -> None:
    said = run(plan, tmp_path / "out", address, merger=merger)

    assert published(tmp_path / "out") == expected
    assert any(reason in line for line in said), said
    assert not (tmp_path / "out" / ".raymeld" / "parts").exists()


def test_a_finished_merge_is_verified_deeper_by_the_workers(
    plan: MergePlan, expected: dict[str, bytes], address: str, tmp_path: Path
) -> None:
    merge(plan, tmp_path / "out", level="structure")
    said: list[str] = []
    options = ClusterOptions(address=address, workers=2)

    result = merge_on_ray(plan, tmp_path / "out", options, watch=lambda _: None, say=said.append)

    assert result.verified is not None
    assert (result.verified.level, result.verified.ok) == ("digest", True)
    assert "workers: at most 2 on cpu, each with 2 CPU" in said
    assert published(tmp_path / "out") == expected


def test_a_token_that_the_cluster_knows_nothing_of_does_no_harm(
    plan: MergePlan,
    expected: dict[str, bytes],
    address: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Any ray.init() of another program leaves a token in the home directory."""
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "a" * 40)

    run(plan, tmp_path / "out", address)

    assert published(tmp_path / "out") == expected


def test_a_shard_that_always_fails_ends_the_merge_and_is_named(
    plan: MergePlan, address: str, tmp_path: Path
) -> None:
    with pytest.raises(RaymeldError, match=r"model-00002-of-.*failed 3 times.*poison") as caught:
        run(plan, tmp_path / "out", address, merger=faults.Poisoned)

    assert caught.value.exit_code == 1
    assert not (tmp_path / "out" / "config.json").exists()


def test_what_a_stopped_merge_has_done_is_proven_by_the_workers_and_not_merged_again(
    plan: MergePlan, expected: dict[str, bytes], address: str, tmp_path: Path
) -> None:
    out, done = tmp_path / "out", [shard.name for shard in plan.shards[:3]]

    def watch(progress: Progress) -> None:
        if progress.done > sum(shard.size for shard in plan.shards[:3]):
            raise RaymeldError("stopped")

    with pytest.raises(RaymeldError, match="stopped"):
        merge(plan, out, watch=watch)
    (out / done[0]).write_bytes((out / done[0]).read_bytes()[:-1] + b"?")
    times = [(out / name).stat().st_mtime_ns for name in done[1:]]

    said = run(plan, out, address)

    assert f"{done[0]} is not as its receipt says; merging it again" in said
    assert f"2 of {len(plan.shards)} shards were there and are proven" in said
    assert published(out) == expected
    assert [(out / name).stat().st_mtime_ns for name in done[1:]] == times


def test_a_driver_that_lost_its_lease_ends_at_once_and_leaves_what_is_its_successors(
    plan: MergePlan, address: str, tmp_path: Path
) -> None:
    out, said = tmp_path / "out", list[str]()
    options = ClusterOptions(address=address, workers=2, collector=faults.LosesTheLease)

    with pytest.raises(LeaseLostError, match="another merge has taken OUT over"):
        merge_on_ray(plan, out, options, watch=lambda _: None, say=said.append)

    assert not any("failure" in line or "another collector" in line for line in said), said
    assert (out / ".raymeld" / "progress.json").read_text() == "the successor's"
    assert (out / ".raymeld" / "parts" / "successor.part").exists()


def test_a_collector_that_never_answers_is_waited_for_as_long_as_the_cluster_is_there(
    plan: MergePlan, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[Lifeline] = []

    def look(lifeline: Lifeline) -> None:
        looks.append(lifeline)
        if len(looks) == 3:
            raise RaymeldError("the cluster is gone")

    monkeypatch.setattr(kept_collector, "WAIT_SECONDS", 0.01)
    monkeypatch.setattr(Lifeline, "look", look)
    with (
        session(address, use_gpus=False),
        closing(KeptCollector(plan, locate(tmp_path), "run", faults.NeverAnswers)) as collector,
        pytest.raises(RaymeldError, match="the cluster is gone"),
    ):
        collector.call("receipts")
    assert collector.log == []


def test_an_interrupt_while_the_workers_are_ended_ends_the_rest_too(
    plan: MergePlan, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[str] = []

    class InterruptedPool(Pool):
        def close(self) -> None:
            super().close()
            (tmp_path / "out" / ".raymeld" / "parts").mkdir(exist_ok=True)  # published by now
            (tmp_path / "out" / ".raymeld" / "parts" / "left.part").touch()
            raise KeyboardInterrupt

    class Watched(KeptCollector):
        def close(self) -> None:
            super().close()
            closed.append("collector")

    monkeypatch.setattr(driver, "Pool", InterruptedPool)
    monkeypatch.setattr(driver, "KeptCollector", Watched)
    with pytest.raises(KeyboardInterrupt):
        run(plan, tmp_path / "out", address)

    assert closed == ["collector"]
    assert not (tmp_path / "out" / ".raymeld" / "parts").exists()


def test_workers_that_cannot_start_end_the_merge_with_the_reason(
    plan: MergePlan, address: str, tmp_path: Path
) -> None:
    with pytest.raises(RaymeldError, match="3 workers in a row failed to start: no driver"):
        run(plan, tmp_path / "out", address, workers=1, merger=faults.CannotStart)

    assert not (tmp_path / "out" / "config.json").exists()


def test_a_cluster_that_imports_a_users_own_package_called_cluster_is_refused(
    plan: MergePlan, tmp_path: Path
) -> None:
    theirs = tmp_path / "theirs" / "cluster"
    theirs.mkdir(parents=True)
    (theirs / "__init__.py").write_text("")

    with (
        running_cluster(PYTHONPATH=str(theirs.parent)) as at,
        pytest.raises(InputError, match=f"imports 'cluster' from {theirs}") as caught,
    ):
        run(plan, tmp_path / "out", at)

    assert caught.value.exit_code == 2
    assert not ray.is_initialized()

"""What ``raymeld status`` says of a merge while it runs, after it stopped, and when it is done."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from handmade import TWO_LANES, small_merge
from leases import take, take_over, unheard

from cluster.status import Status, read_status, status_document, status_lines
from merge_core import progress
from merge_core.errors import InputError, RaymeldError
from merge_core.merge import merge
from merge_core.plan import MergePlan
from merge_core.progress import Progress, ProgressFile, WorkerProgress
from merge_core.stages import layers_of
from merge_core.stores.location import locate


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> MergePlan:
    return small_merge(tmp_path_factory.mktemp("status"))


def progress_of(done: int, phase: str = "merging") -> Progress:
    worker = WorkerProgress(
        worker="worker-3", device="cuda on far", doing="model-00002", done=250, size=1000
    )
    return Progress(phase=phase, done=done, total=5_000_000_000, workers=(worker,))


def said(status: Status) -> str:
    return "\n".join(status_lines(status))


def test_a_running_merge_tells_who_does_what(plan: MergePlan, out: Path) -> None:
    seen: list[Status] = []

    def watch(now: Progress) -> None:
        if now.phase == "merging" and now.done > plan.shards[0].size:
            seen.append(read_status(locate(out)))

    merge(plan, out, choice=TWO_LANES, watch=watch)

    status = seen[0]
    assert (status.state, status.done, status.shards) == ("running", 1, len(plan.shards))
    assert status.holder is not None
    assert f"process {status.holder.pid} on {status.holder.host}" in said(status)
    assert f"shards   1 of {len(plan.shards)} done" in said(status)


def test_a_stopped_merge_tells_what_is_done_why_it_ended_and_how_to_go_on(
    plan: MergePlan, out: Path
) -> None:
    def watch(now: Progress) -> None:
        if now.done > plan.shards[0].size:
            raise RaymeldError("the disk is gone", "worker-0")

    with pytest.raises(RaymeldError, match="the disk is gone"):
        merge(plan, out, choice=TWO_LANES, watch=watch)
    status = read_status(locate(out))

    assert (status.state, status.done, status.holder) == ("stopped", 1, None)
    assert "stopped: worker-0: the disk is gone" in said(status)
    assert "the same merge command again goes on from here" in said(status)


def test_a_stage_that_is_done_tells_which_layers_are_missing(plan: MergePlan, out: Path) -> None:
    first, *others = (shard.index for shard in plan.shards)
    merge(dataclasses.replace(plan, stage=frozenset({first})), out, choice=TWO_LANES)
    status = read_status(locate(out))

    assert (status.state, status.done) == ("stopped", 1)
    assert status.missing == layers_of(plan, others)
    assert f"missing  --layers {status.missing}; a stage must name some of these" in said(status)


def test_a_finished_merge_is_told_as_finished(plan: MergePlan, out: Path) -> None:
    merge(plan, out, choice=TWO_LANES)
    status = read_status(locate(out))

    assert (status.state, status.done) == ("finished", len(plan.shards))
    assert said(status).startswith(f"finished {out}, plan {status.fingerprint[:12]}")


def test_the_time_left_follows_the_pace_of_this_phase(
    plan: MergePlan, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([1000.0, 1000.0, 1000.0, 1060.0, 1060.0])
    merge(plan, out, choice=TWO_LANES)
    with take(out) as lease, monkeypatch.context() as patch:
        patch.setattr(progress, "time", SimpleNamespace(time=lambda: next(clock)))
        file = ProgressFile(locate(out), lease.holder.run, lambda _: None, unheard)
        file.watch(progress_of(2_000_000_000))  # what an earlier run has done is no pace
        file.watch(progress_of(3_000_000_000))
    with take(out):
        status = read_status(locate(out))

    assert status.seconds_left == pytest.approx(120)
    assert "merging, 3.00 of 5.00 GB, about 2 minutes left" in said(status)
    assert "worker-3 cuda on far: model-00002 25%" in said(status)
    assert "nothing was heard for" in said(status)  # since 1970


@pytest.mark.parametrize("level", ["digest", "numeric"])
def test_no_phase_does_more_than_all(plan: MergePlan, out: Path, level: str) -> None:
    """The numeric check reads base and result, so more than the files that it looks at have."""
    seen: list[Progress] = []
    merge(plan, out, choice=TWO_LANES, level=level, watch=seen.append)
    sizes = [shard.size for shard in plan.shards]
    verifying = [(now.done, now.total) for now in seen if now.phase == "verifying"]

    assert verifying == [(sum(sizes[:n]), sum(sizes)) for n in range(len(sizes))]
    assert all(now.done <= now.total for now in seen)


def test_decisions_are_kept_and_the_last_ones_shown(plan: MergePlan, out: Path) -> None:
    merge(plan, out, choice=TWO_LANES)
    heard: list[str] = []
    with (
        take(out) as lease,
        ProgressFile(locate(out), lease.holder.run, lambda _: None, heard.append) as file,
    ):
        for number in range(60):
            file.say(f"decision {number}")
    status = read_status(locate(out))

    assert heard == [f"decision {n}" for n in range(60)]
    kept = [line for _, line in status_document(status)["progress"]["lines"]]
    assert kept == [f"decision {n}" for n in range(10, 60)]
    assert "decision 50" in said(status)
    assert "decision 49" not in said(status)


def test_a_merge_that_lost_its_lease_leaves_its_successors_progress_alone(
    plan: MergePlan, out: Path
) -> None:
    merge(plan, out, choice=TWO_LANES)
    with (
        take(out) as lost,
        ProgressFile(locate(out), lost.holder.run, lambda _: None, unheard) as file,
    ):
        file.watch(progress_of(1))
        with take_over(out) as later:
            ProgressFile(locate(out), later.holder.run, lambda _: None, unheard).watch(
                progress_of(2)
            )

    assert read_status(locate(out)).progress["done"] == 2


@pytest.mark.parametrize("content", [None, "", "[]", '{"shards": 1}'])
def test_a_directory_without_a_merge_is_refused(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / ".raymeld").mkdir()
        (tmp_path / ".raymeld" / "plan.json").write_text(content)

    with pytest.raises(InputError, match="there is no merge"):
        read_status(locate(tmp_path))


def test_the_command_answers_in_json(plan: MergePlan, out: Path) -> None:
    merge(plan, out, choice=TWO_LANES)
    command = [Path(sys.executable).with_name("raymeld"), "status", out, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)

    assert json.loads(done.stdout)["state"] == "finished"
    assert done.stderr == ""

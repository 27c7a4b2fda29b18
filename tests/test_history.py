"""What OUT keeps of each run: phases, pace, failures, decisions, verification."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet
import pytest
from handmade import TWO_LANES, published
from leases import take, take_over, unheard

from actors.events import ItemDone, ItemFailed, WorkerLost, WorkerReady
from cluster.tasks import PROVING, checking, merging
from cluster.timing import Timing
from merge_core import history
from merge_core import merge as merge_module
from merge_core.errors import DeviceMemoryError, RaymeldError, VerificationError
from merge_core.history import MOST_LINES, MOST_SAMPLES, Attempt, History, read_runs
from merge_core.merge import merge
from merge_core.output import RUNS
from merge_core.plan import MergePlan
from merge_core.progress import Progress
from merge_core.stores.location import locate
from merge_core.verify import FileCheck, Finding
from merge_core.worker import ShardWorker


def at(done: int, phase: str = "merging") -> Progress:
    return Progress(phase=phase, done=done, total=1000, workers=())


def test_a_finished_merge_keeps_its_run(small: MergePlan, out: Path) -> None:
    result = merge(small, out, choice=TWO_LANES)
    (run,) = read_runs(locate(out))

    assert (run["outcome"], run["error"]) == ("done", "")
    assert run["options"] == {"address": "inline", "device": "auto", "verify": "digest"}
    assert [phase["phase"] for phase in run["phases"]] == ["merging", "verifying"]
    assert run["phases"][0]["done"] == sum(shard.size for shard in small.shards)
    assert run["began"] <= run["phases"][0]["began"] <= run["phases"][1]["began"] <= run["ended"]
    assert result.verified is not None
    assert run["verification"]["checks"] == list(result.verified.checks)
    assert {"raymeld", "python", "torch", "ray"} <= run["versions"].keys()


def test_the_ledger_keeps_of_each_receipt_all_but_its_tensors(small: MergePlan, out: Path) -> None:
    result = merge(small, out, choice=TWO_LANES)
    schema = pyarrow.parquet.read_schema(out / ".raymeld" / "ledger.parquet")
    shards = json.loads(schema.metadata[b"raymeld"])["shards"]

    names = [shard.name for shard in small.shards]
    assert shards == [
        {**receipt.about, "file": name}
        for receipt, name in zip(result.receipts, names, strict=True)
    ]
    assert all(0 < shard["peak_memory"] < shard["memory_limit"] for shard in shards)


def test_a_merge_that_stops_and_goes_on_keeps_both_runs(small: MergePlan, out: Path) -> None:
    def watch(now: Progress) -> None:
        if now.done > small.shards[0].size:
            raise RaymeldError("the disk is gone", "worker-0")

    with pytest.raises(RaymeldError, match="the disk is gone"):
        merge(small, out, choice=TWO_LANES, watch=watch)
    merge(small, out, choice=TWO_LANES)
    first, second = read_runs(locate(out))

    assert (first["outcome"], first["error"]) == ("stopped", "worker-0: the disk is gone")
    assert second["outcome"] == "done"
    assert [phase["phase"] for phase in second["phases"]] == ["proving", "merging", "verifying"]


def test_an_overwritten_merge_leaves_no_runs(small: MergePlan, out: Path) -> None:
    merge(small, out, choice=TWO_LANES)
    merge(small, out, choice=TWO_LANES, overwrite=True)

    assert len(read_runs(locate(out))) == 1


def test_a_shard_that_ran_out_of_memory_is_kept_and_changes_no_byte(
    small: MergePlan, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge(small, tmp_path / "other", choice=TWO_LANES)
    honest = ShardWorker.merge

    def fail_once(
        self: ShardWorker, index: int, attempt: int, *others: object, **named: object
    ) -> object:
        if (index, attempt) == (1, 1):
            raise DeviceMemoryError("no room", "cpu")
        return honest(self, index, attempt, *others, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(ShardWorker, "merge", fail_once)
    merge(small, out, choice=TWO_LANES)
    (attempt,) = read_runs(locate(out))[0]["attempts"]

    assert (attempt["worker"], attempt["outcome"], attempt["why"]) == (
        "inline",
        "failed",
        "cpu: no room",
    )
    assert attempt["task"] == small.shards[1].name
    assert published(out) == published(tmp_path / "other")


def test_a_failed_verification_is_kept(
    small: MergePlan, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finding = Finding(check="digest", where="model.safetensors: a", what="is wrong")
    honest = merge_module.verify

    def spoiled(*given: object, **named: object) -> object:
        report = honest(*given, **named)  # type: ignore[arg-type]
        return dataclasses.replace(report, findings=(finding,))

    monkeypatch.setattr(merge_module, "verify", spoiled)
    with pytest.raises(VerificationError):
        merge(small, out, choice=TWO_LANES)
    (run,) = read_runs(locate(out))

    assert run["verification"]["findings"] == [dataclasses.asdict(finding)]
    assert "1 check failed" in run["error"]


def test_the_pace_is_thinned_and_the_first_decisions_are_kept(
    small: MergePlan, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge(small, out, choice=TWO_LANES)
    clock = SimpleNamespace(now=1000.0, strftime=lambda *_: "19700101T000000Z", gmtime=float)
    clock.time = lambda: clock.now
    with take(out) as lease:
        monkeypatch.setattr(history, "time", clock)
        with History(locate(out), lease.holder, {}, lambda _: None, unheard) as kept:
            for second in range(5000):
                clock.now += 1
                kept.watch(at(second))
                kept.say(f"decision {second}")
        run = read_runs(locate(out))[0]

    times = [when for when, _, _ in run["samples"]]
    assert MOST_SAMPLES / 2 <= len(times) <= MOST_SAMPLES
    assert times == sorted(times)
    assert (times[0], run["phases"][0]["done"]) == (1001.0, 4999)
    assert [line for _, line in run["lines"]] == [f"decision {n}" for n in range(MOST_LINES)]


def test_a_run_that_lost_its_lease_writes_no_more(small: MergePlan, out: Path) -> None:
    merge(small, out, choice=TWO_LANES)
    with (
        take(out) as lost,
        History(locate(out), lost.holder, {}, lambda _: None, unheard) as kept,
        take_over(out),
    ):
        kept.say("too late")

    last = read_runs(locate(out))[-1]
    assert (last["outcome"], last["lines"]) == ("running", [])


def test_what_a_killed_run_was_writing_is_removed_by_the_next(small: MergePlan, out: Path) -> None:
    merge(dataclasses.replace(small, stage=frozenset({0})), out, choice=TWO_LANES)
    (out / RUNS / "killed.tmp").touch()
    merge(small, out, choice=TWO_LANES)

    assert {path.suffix for path in (out / RUNS).iterdir()} == {".json"}
    assert len(read_runs(locate(out))) == 2


def test_what_cannot_be_read_is_left_out(small: MergePlan, out: Path) -> None:
    merge(small, out, choice=TWO_LANES)
    for name, text in {"a": "", "b": "[]", "c": '{"began": "today"}'}.items():
        (out / RUNS / f"{name}.json").write_text(text)

    assert len(read_runs(locate(out))) == 1


def test_attempts_without_a_receipt_are_timed(small: MergePlan) -> None:
    noted: list[Attempt] = []
    timing = Timing(noted.append)
    shard = merging(small.shards[0], read_ahead=False)
    check = checking(FileCheck(file=locate("/out/a"), level="digest", rows=()), 1, PROVING)
    for worker in range(5):
        timing.handle(WorkerReady(worker=worker, host=f"host-{worker}"))
        timing.begin(worker, check if worker == 4 else shard)
    timing.handle(ItemDone(worker=0, item=0))
    timing.handle(ItemFailed(worker=1, item=0, error=RaymeldError("a bug", "there")))
    timing.handle(WorkerLost(worker=2, reason="its node died"))
    timing.release(3)
    timing.handle(ItemDone(worker=4, item=1))
    timing.release(4)  # it was idle

    assert [(a.host, a.phase, a.outcome, a.why) for a in noted] == [
        ("host-1", "merging", "failed", "there: a bug"),
        ("host-2", "merging", "lost", "its node died"),
        ("host-3", "merging", "released", ""),
        ("host-4", "proving", "done", ""),
    ]
    assert all(a.began <= a.ended for a in noted)

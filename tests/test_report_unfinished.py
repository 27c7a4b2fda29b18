"""What the report says of merges that stopped, failed or are at work."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import pytest
from handmade import TWO_LANES
from leases import take

from cluster.report.accounting import key_table, uses
from cluster.report.evidence import Evidence, read_evidence
from cluster.report.facts import gaps, outcome
from cluster.report.page import page
from cluster.report.timeline import timelines
from merge_core import merge as merge_module
from merge_core.errors import RaymeldError, VerificationError
from merge_core.merge import merge
from merge_core.plan import MergePlan
from merge_core.progress import Progress
from merge_core.stores.location import locate
from merge_core.verify import Finding


def stopped(plan: MergePlan, out: Path) -> Evidence:
    """After two shards."""

    def watch(now: Progress) -> None:
        if now.done > plan.shards[0].size + plan.shards[1].size:
            raise RaymeldError("the disk is gone", "worker-0")

    with pytest.raises(RaymeldError, match="the disk is gone"):
        merge(plan, out, choice=TWO_LANES, watch=watch)
    return read_evidence(locate(out))


def test_a_half_done_merge_is_told_from_its_receipts(small: MergePlan, out: Path) -> None:
    evidence = stopped(small, out)
    found, done = (
        outcome(evidence),
        [task.target.name for shard in small.shards[:2] for task in shard.tasks],
    )

    assert (found.tone, found.title) == ("bad", "Failed")
    said = "2 of 4 shards done. worker-0: the disk is gone. Once that is mended, the same command"
    assert found.text.startswith(said)
    assert [row["tensor"] for row in evidence.tensors] == done
    assert f"{27 - len(done)} tensors not merged yet (--layers " in next(gaps(evidence))
    rows = key_table(uses(evidence), evidence).rows
    assert {row[4] for row in rows} == {"yes", "not yet"}
    assert "worker-0: the disk is gone" in page(evidence, [])


def test_what_was_merged_after_the_last_progress_of_a_failed_run_counts(
    small: MergePlan, out: Path
) -> None:
    evidence = stopped(small, out)
    run = evidence.last_run
    early = {**run["phases"][-1], "ended": run["began"] + 1e-3, "done": 0}
    heard = {**run, "phases": [early], "samples": []}
    (line,) = timelines(dataclasses.replace(evidence, runs=(heard,)))
    ((_, points),) = line.rates
    moved = sum((b - a) * rate for (a, _), (b, rate) in itertools.pairwise(points))

    assert line.phases[-1][2] == pytest.approx(run["ended"] - run["began"])
    assert moved == pytest.approx(sum(shard.size for shard in small.shards[:2]), rel=0.01)


@pytest.mark.parametrize(("why", "title"), [("interrupted", "Interrupted"), ("", "Stopped")])
def test_who_was_asked_to_stop_or_killed_has_not_failed(
    small: MergePlan, out: Path, why: str, title: str
) -> None:
    evidence = stopped(small, out)
    run = {**evidence.last_run, "error": why}
    found = outcome(dataclasses.replace(evidence, runs=[run]))

    assert (found.tone, found.title) == ("bad", title)
    assert found.text == "2 of 4 shards done. The same command again goes on from here."


def test_an_interrupted_run_is_kept_as_one(small: MergePlan, out: Path) -> None:
    def watch(now: Progress) -> None:
        if now.done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge(small, out, choice=TWO_LANES, watch=watch)
    assert outcome(read_evidence(locate(out))).title == "Interrupted"


def test_a_merge_that_went_on_has_a_time_line_for_each_run(small: MergePlan, out: Path) -> None:
    stopped(small, out)
    merge(small, out, choice=TWO_LANES)
    first, second = timelines(read_evidence(locate(out)))

    assert (len(first.bars), len(second.bars)) == (2, len(small.shards) - 2)
    assert [phase for phase, _, _ in second.phases] == ["proving", "merging", "verifying"]


def test_a_merge_at_work_is_told_as_running(small: MergePlan, out: Path) -> None:
    stopped(small, out)
    with take(out):
        assert outcome(read_evidence(locate(out))).title == "Running"


def test_a_stage_that_is_done_is_no_failure(small: MergePlan, out: Path) -> None:
    merge(dataclasses.replace(small, stage=frozenset({0, 1})), out, choice=TWO_LANES)
    found = outcome(read_evidence(locate(out)))

    assert (found.tone, found.title) == ("open", "Done with a stage")
    assert "2 of 4 shards done; left to other stages: --layers " in found.text


def test_a_failed_verification_names_what_failed(
    small: MergePlan, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finding = Finding(check="digest", where="model.safetensors: a", what="is not as written")
    honest = merge_module.verify

    def spoiled(*given: object, **named: object) -> object:
        return dataclasses.replace(honest(*given, **named), findings=(finding,))  # type: ignore[arg-type]

    monkeypatch.setattr(merge_module, "verify", spoiled)
    with pytest.raises(VerificationError):
        merge(small, out, choice=TWO_LANES)
    evidence = read_evidence(locate(out))

    assert outcome(evidence).title == "Verification failed"
    assert outcome(evidence).text.startswith("1 check failed: nothing was published.")
    assert "model.safetensors: a: is not as written" in page(evidence, [])

"""The report of a merge on Ray in which workers failed, lied and died."""

from __future__ import annotations

from collections import Counter

import faults
import pytest
from clusters import running_cluster
from handmade import small_merge

from cluster.driver import merge_on_ray
from cluster.report.evidence import Evidence, read_evidence
from cluster.report.facts import figures, inputs, outcome
from cluster.report.page import page
from cluster.report.timeline import RunTimeline, memory_table, timelines
from cluster.workers import ClusterOptions
from merge_core.stores.location import locate


@pytest.fixture(scope="module")
def evidence(tmp_path_factory: pytest.TempPathFactory) -> Evidence:
    where = tmp_path_factory.mktemp("ray")
    plan, out = small_merge(where), where / "out"
    (out / ".raymeld").mkdir(parents=True)
    (out / ".raymeld" / "go").touch()  # the faults may begin at once
    faults.by_value()
    with running_cluster() as address:
        options = ClusterOptions(address=address, workers=2, merger=faults.FailsInEveryWay)
        merge_on_ray(plan, out, options, watch=lambda _: None, say=lambda _: None)
    return read_evidence(locate(out))


@pytest.fixture(scope="module")
def line(evidence: Evidence) -> RunTimeline:
    (one,) = timelines(evidence)
    return one


def test_every_attempt_is_on_the_time_line(evidence: Evidence, line: RunTimeline) -> None:
    shards = len(evidence.plan["shards"])

    assert Counter(bar.outcome for bar in line.bars) == {
        "merged": shards,
        "verified": shards,
        "failed": 3,
        "worker lost": 1,
    }
    assert all(0 <= bar.began < bar.ended <= line.seconds for bar in line.bars)
    assert {bar.worker for bar in line.bars} == set(line.workers)
    assert [name for name, _, _ in line.phases][-1] == "verifying"


def test_failures_are_told_with_what_was_tried_and_why(
    evidence: Evidence, line: RunTimeline
) -> None:
    whys = {(bar.what, bar.outcome): bar.why for bar in line.bars if bar.outcome != "merged"}
    names = [shard["name"] for shard in evidence.plan["shards"]]

    assert "was made from plan 000000000000" in whys[names[0], "failed"]
    assert whys[names[1], "failed"] == "a bug"  # the last of two
    assert (names[2], "worker lost") in whys
    text = page(evidence, [])
    assert "cpu: no room" in text
    assert f"retrying {names[1]} after failure 1 of 3" in text


def test_the_head_of_the_report_counts_them(evidence: Evidence) -> None:
    said = {what: value for value, what in figures(evidence)}
    facts = {fact.label: fact.text for fact in inputs(evidence)}

    assert outcome(evidence).title == "Merged and verified"
    assert said["attempts failed or lost"] == "4"
    assert "workers 2" in facts["Run with"]
    assert "ray 2." in facts["Versions"]


def test_workers_tell_what_they_took_and_could_have_taken(evidence: Evidence) -> None:
    rows = memory_table(evidence.shards).rows

    assert sum(row[2] for row in rows) == len(evidence.plan["shards"])
    assert all(0 < row[5] < row[6] for row in rows)
    assert {row[7] for row in rows} == {None}

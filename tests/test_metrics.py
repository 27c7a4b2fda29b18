"""What Prometheus gets to see of a merge on a real Ray: the truth, to the byte."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from grafana import asked_for, dashboard, queries, values_of
from scrape import (
    Sample,
    Scraped,
    merge_in_trouble,
    scraped_cluster,
    values,
    verify_there,
    verify_three_times,
)

from actors import metrics
from actors.events import ItemDone
from cluster.tasks import PROVING, RESULTS, VERIFYING
from merge_core.ledger import Receipt
from merge_core.plan import MergePlan
from merge_core.stores.location import locate
from merge_core.verify import FileResult
from merge_core.verify.report import Finding

DOCUMENTATION = Path(__file__).resolve().parent.parent / "docs" / "observability.md"


@dataclass(frozen=True)
class Merged:
    """A merge in which one part was a lie, two attempts raised, and one lost its worker."""

    receipts: tuple[Receipt, ...]
    out: Path
    shown: bool
    said: list[str]
    samples: list[Sample]


@pytest.fixture(scope="module")
def where() -> Iterator[Scraped]:
    with scraped_cluster(cpus=2) as running:
        yield running


@pytest.fixture(scope="module")
def merged(where: Scraped, plan: MergePlan, tmp_path_factory: pytest.TempPathFactory) -> Merged:
    out = tmp_path_factory.mktemp("counted") / "out"
    (result, shown, said), samples = where.drive(merge_in_trouble, plan, out)
    return Merged(tuple(result.receipts), out, shown, said, samples)


def test_a_shard_is_merged_when_it_is_accepted_and_an_attempt_that_is_not_has_failed(
    merged: Merged,
) -> None:
    shards = len(merged.receipts)
    assert values(merged.samples, "shards_total") == {
        ("cpu", "merged"): shards,
        ("cpu", "verified"): shards,
        ("cpu", "failed"): 3,
        ("cpu", "lost"): 1,
    }


def test_bytes_are_those_of_base_and_result(merged: Merged) -> None:
    rows = [row for receipt in merged.receipts for row in receipt.tensors]
    assert values(merged.samples, "bytes_total") == {
        ("cpu", "read"): sum(row.bytes_read for row in rows),
        ("cpu", "written"): sum(f.stat().st_size for f in merged.out.glob("*.safetensors")),
        ("cpu", "read_back"): sum(row.nbytes for row in rows),
    }


def test_seconds_are_those_of_the_ledger(merged: Merged) -> None:
    rows = [row for receipt in merged.receipts for row in receipt.tensors]
    seconds = values(merged.samples, "phase_seconds_total")
    assert seconds.pop(("cpu", "verify")) > 0
    assert seconds == {
        ("cpu", "read"): pytest.approx(sum(row.read_seconds for row in rows)),
        ("cpu", "merge"): pytest.approx(sum(row.merge_seconds for row in rows)),
        ("cpu", "write"): pytest.approx(sum(row.write_seconds for row in rows)),
    }


def test_what_is_under_way_shows_while_it_is(merged: Merged) -> None:
    assert merged.shown
    assert values(merged.samples, "in_flight") == {("cpu",): 0}
    assert values(merged.samples, "workers") == {("cpu",): 0}


def test_the_log_names_the_driver_that_prometheus_knows(merged: Merged) -> None:
    (driver,) = {sample.labels["WorkerId"] for sample in merged.samples}
    assert f"its metrics are those of driver {driver}" in merged.said


def test_the_most_memory_is_that_of_the_greediest_shard(merged: Merged) -> None:
    most = max(receipt.peak_memory for receipt in merged.receipts)
    assert values(merged.samples, "peak_bytes") == {("cpu", "host"): most}


def test_a_file_that_is_not_as_its_ledger_says_is_refuted(
    where: Scraped, merged: Merged, finished: Path
) -> None:
    file = min(finished.glob("*.safetensors"))
    size, rest = file.stat().st_size, len(list(finished.glob("*.safetensors"))) - 1
    with file.open("r+b") as damaged:
        damaged.seek(size - 1)
        last = damaged.read(1)[0]
        damaged.seek(size - 1)
        damaged.write(bytes([last ^ 1]))

    report, samples = where.drive(verify_there, finished)

    assert not report.ok
    assert values(samples, "shards_total") == {("cpu", "refuted"): 1, ("cpu", "verified"): rest}


def test_of_a_program_that_connects_again_the_first_connection_counts(
    where: Scraped, merged: Merged, finished: Path
) -> None:
    files = len(list(finished.glob("*.safetensors")))

    _, samples = where.drive(verify_three_times, finished)

    assert values(samples, "shards_total") == {("cpu", "verified"): files}


def test_the_documentation_names_what_is_there(merged: Merged) -> None:
    documented = re.findall(r"^\| `(ray_raymeld_\w+)` \|", DOCUMENTATION.read_text(), re.MULTILINE)
    assert set(documented) == {sample.name for sample in merged.samples}


def test_the_dashboard_asks_for_nothing_that_is_not_there(merged: Merged) -> None:
    board = dashboard()
    variables = [one["query"]["query"] for one in board["templating"]["list"][1:]]
    labels: dict[str, set[str]] = {}
    for sample in merged.samples:
        labels.setdefault(sample.name, set()).update(sample.labels)

    asked: set[str] = set()
    for query in [*queries(board), *variables]:
        for metric, wanted in asked_for(query).items():
            assert wanted <= labels[metric], query
            asked.add(metric)

    assert asked == labels.keys()


def test_the_dashboard_compares_with_values_that_there_are(merged: Merged) -> None:
    there = {value for sample in merged.samples for value in sample.labels.values()}
    compared = {
        value
        for query in queries(dashboard())
        for label in ("result", "direction", "phase", "memory")
        for value in values_of(query, label)
    }
    assert compared - there == {"refuted"}  # in the merge nothing is


def test_what_an_earlier_run_left_is_proven_and_not_verified(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    counted: list[dict[str, str]] = []
    monkeypatch.setattr(metrics, "_add", lambda *_, **tags: counted.append(tags))
    counter = metrics.Metrics.__new__(metrics.Metrics)  # it counts on Ray
    counter._counts = True
    for name in ("_shards", "_bytes", "_seconds"):
        setattr(counter, name, None)

    for finding in ((), (Finding(check="digest", where="f", what="differs"),)):
        check = FileResult(file=locate("f"), findings=finding, tensors=1, bytes_read=1, seconds=1)
        for rank in (PROVING, VERIFYING):
            counter.count(ItemDone(worker=0, item=0, result=check), "cpu", RESULTS[rank])

    assert [tags["result"] for tags in counted if "result" in tags] == [
        "proven",
        "verified",
        "refuted",
        "refuted",
    ]

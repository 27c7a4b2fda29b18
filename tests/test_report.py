"""What the report says, against what lies in OUT: numbers, states, where each key went."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import importlib.resources
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from handmade import TWO_LANES
from models import read_tensors
from moe import write_expert_adapter
from played import as_sealed, play
from typer.testing import CliRunner

from cluster.cli import app
from cluster.report.accounting import uses
from cluster.report.changes import changed, heat_map, tensor_table, whole_change
from cluster.report.evidence import Evidence, read_evidence
from cluster.report.facts import figures, gaps, inputs, outcome, title
from cluster.report.page import LIBRARY, page
from cluster.report.spectrum import spectra
from cluster.report.timeline import memory_table, timelines
from merge_core.errors import InputError
from merge_core.merge import merge
from merge_core.plan import MergePlan
from merge_core.planner import make_plan
from merge_core.stores.location import locate

ECHARTS = "b66b25aeb4df84e33199dc21694014d336d222cbd9deb0e5a7c14bd6aa0d0fd0"
"""sha256 of dist/echarts.min.js of the npm package echarts 6.1.0."""


@pytest.fixture(scope="module")
def finished(small: MergePlan, tmp_path_factory: pytest.TempPathFactory) -> Evidence:
    out = tmp_path_factory.mktemp("report") / "out"
    merge(small, out, choice=TWO_LANES)
    return read_evidence(locate(out))


def test_a_finished_merge_is_told_with_its_numbers(finished: Evidence, small: MergePlan) -> None:
    said = {what: value for value, what in figures(finished)}

    assert outcome(finished).title == "Merged and verified"
    assert title(finished) == "adapter into base"
    assert said["tensors merged, of 27"] == "14"
    assert said["worker on 1 machine"] == "1"
    assert said["attempts failed or lost"] == "0"
    assert list(gaps(finished)) == []
    facts = {fact.label: fact for fact in inputs(finished)}
    assert facts["Adapter"].text == f"LORA, {small.adapters[0].path}, weight 1"
    assert facts["Base"].notes[0].startswith("model.safetensors, ")
    assert facts["Run with"].text == "address inline, device auto, verify digest"


def test_changes_are_those_of_the_weights(finished: Evidence, small: MergePlan) -> None:
    before, after = read_tensors(small.base.local), read_tensors(finished.status.out.local)
    first, heat = changed(finished.tensors)[0], heat_map(finished.tensors)
    norms = {name: float(tensor.double().norm()) for name, tensor in before.items()}
    moved = {n: float((after[n].double() - before[n].double()).norm()) for n in before}
    merged = [row["tensor"] for row in changed(finished.tensors)]

    assert first["relative_change"] == max(row["relative_change"] or 0 for row in finished.tensors)
    assert set(heat.layers) == {0, 1}
    assert len(heat.modules) == 7
    for layer, module, value, count in heat.cells:
        name = f"model.layers.{heat.layers[layer]}.{heat.modules[module]}.weight"
        assert count == 1
        assert value == pytest.approx(moved[name] / norms[name], rel=0.01)  # rounded to bfloat16
    total = math.hypot(*(moved[n] for n in merged)) / math.hypot(*(norms[n] for n in merged))
    assert whole_change(finished.tensors) == pytest.approx(total, rel=0.01)
    assert [row[0] for row in tensor_table(finished.tensors).rows][: len(merged)] == merged


def test_layers_that_are_not_merged_yet_are_a_gap_in_the_heat_map(finished: Evidence) -> None:
    """Or layer 23 would stand beside 19, as if there were none between."""
    rows = [row for row in finished.tensors if ".layers.1." in row["tensor"]]
    later = [{**row, "tensor": row["tensor"].replace(".1.", ".4.")} for row in rows]
    heat = heat_map([*rows, *later])

    assert heat.layers == (1, 2, 3, 4)
    assert {layer for layer, *_ in heat.cells} == {0, 3}
    assert [set(row[1:]) == {None} for row in heat.table.rows] == [False, True, True, False]
    assert heat_map([]).layers == ()


def test_the_time_line_has_every_shard_where_and_when_it_was_merged(finished: Evidence) -> None:
    (line,) = timelines(finished)

    assert [phase for phase, _, _ in line.phases] == ["merging", "verifying"]
    assert [bar.outcome for bar in line.bars] == ["merged"] * len(finished.plan["shards"])
    assert all(0 <= bar.began < bar.ended <= line.seconds for bar in line.bars)
    assert [name for name, _ in line.rates] == ["merging", "verifying"]
    (row,) = memory_table(finished.shards).rows
    assert row[2] == len(finished.plan["shards"])
    assert 0 < row[5] < row[6]


def test_of_an_old_merge_the_page_says_what_is_not_known(small: MergePlan, out: Path) -> None:
    import pyarrow.parquet as pq

    merge(small, out, choice=TWO_LANES)
    state = out / ".raymeld"
    shutil.rmtree(state / "runs")
    plan = json.loads((state / "plan.json").read_bytes())
    plan["adapters"] = [{"path": a["path"], "weight": a["weight"]} for a in plan["adapters"]]
    for name in ("architectures", "header_digests", "notes"):
        del plan[name]
    (state / "plan.json").write_text(json.dumps(plan))
    table = pq.read_table(state / "ledger.parquet")
    about = {"raymeld": json.dumps({"files": {}})}
    pq.write_table(table.replace_schema_metadata(about), state / "ledger.parquet")
    evidence = read_evidence(locate(out))

    assert [line.split(":")[0] for line in gaps(evidence)] == [
        "It kept no history of its runs",
        "Its ledger does not tell when which shard was merged.",
    ]
    assert timelines(evidence) == []
    assert len(uses(evidence)) == 28
    (one,) = spectra(evidence, 1)
    assert (one.values, one.why[:36]) == ((), "this merge kept no digests of its ad")
    assert "When what was merged is not known" in page(evidence, [one])


def test_the_same_evidence_gives_the_same_page(finished: Evidence) -> None:
    assert page(finished, []) == page(finished, [])


def test_a_mixture_of_experts_of_thousands_of_tensors_stays_under_two_megabytes(
    moe: Callable[..., Path], tmp_path: Path
) -> None:
    base = moe()
    adapter = write_expert_adapter(tmp_path / "a", base, ["up_proj"], lora_alpha=6)
    plan = as_sealed(make_plan(base, [adapter], shard_bytes=1))
    shards = []
    for copy in range(60):  # of tensors whose names and digests no compressor has seen yet
        for shard in plan.shards:
            tasks = tuple(_renamed(task, copy) for task in shard.tasks)
            number, name = len(shards), f"model-{len(shards):05}.safetensors"
            shards.append(dataclasses.replace(shard, index=number, name=name, tasks=tasks))
    many = dataclasses.replace(plan, shards=tuple(shards))
    text = page(read_evidence(locate(play(many, tmp_path / "out", workers=64))), [])

    assert len(list(many.tasks)) > 4000
    assert len(text) < 2_000_000


def _renamed(task: object, copy: int) -> object:
    name = re.sub(r"layers\.(\d+)", lambda at: f"layers.{2 * copy + int(at[1])}", task.target.name)
    return dataclasses.replace(task, target=dataclasses.replace(task.target, name=name))


def test_the_library_of_the_charts_is_the_published_one() -> None:
    packed = importlib.resources.files("cluster.report").joinpath("page", LIBRARY).read_bytes()

    assert hashlib.sha256(gzip.decompress(packed)).hexdigest() == ECHARTS


def test_the_command_writes_the_page_and_answers_in_json(
    finished: Evidence, tmp_path: Path
) -> None:
    command = [
        Path(sys.executable).with_name("raymeld"),
        "report",
        str(finished.status.out),
        "--json",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    answer, written = json.loads(done.stdout), tmp_path / "out-report.html"

    assert written.read_text() == page(finished, [])
    assert answer == {
        "ok": True,
        "out": str(finished.status.out),
        "report": str(written),
        "bytes": written.stat().st_size,
        "outcome": "Merged and verified",
    }
    assert done.stderr == ""


def test_a_path_that_is_no_utf_8_is_told_as_far_as_it_can_be(
    small: MergePlan, tmp_path: Path
) -> None:
    """As of files from a machine that called them in GBK."""
    out, written = tmp_path / os.fsdecode(b"\xd6\xd0-out"), tmp_path / "report.html"
    merge(small, out, choice=TWO_LANES)
    done = CliRunner().invoke(app, ["report", str(out), "--output", str(written)])

    assert done.exit_code == 0, done.output
    assert f"{tmp_path}/??-out" in written.read_text(encoding="utf-8")


def test_a_directory_without_a_merge_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no merge"):
        read_evidence(locate(tmp_path))


def test_a_ledger_that_is_none_is_refused(small: MergePlan, out: Path) -> None:
    merge(small, out, choice=TWO_LANES)
    (out / ".raymeld" / "ledger.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match="its ledger cannot be read"):
        read_evidence(locate(out))

"""What --json answers, held to docs/json.md: its fields, and their types."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from handmade import TWO_LANES, Geometry, random_factors, random_tensors, write_adapter, write_base
from pages import ROOT
from test_diagnosis import BASE, DRIVER, FULL, GPU, LATE, LOOKED, checkup, node
from typer.testing import CliRunner

from cluster.cli import app
from cluster.diagnosis import diagnose
from cluster.doctor_report import report_document
from cluster.jobs import Job
from cluster.jobs_commands import _document
from cluster.status import read_status, status_document
from merge_core.errors import Problem
from merge_core.merge import merge
from merge_core.nvidia import GpuProcess
from merge_core.plan import MergePlan
from merge_core.planner import make_plan
from merge_core.progress import Progress
from merge_core.reachable import ScratchSight
from merge_core.stores.location import locate

TYPES = {
    bool: "boolean",
    int: "number",
    float: "number",
    str: "string",
    type(None): "null",
    dict: "object",
    list: "array",
}
Fields = dict[str, set[str]]


def documented(section: str) -> Fields:
    """The types of each field in a table of the page."""
    page = (ROOT / "docs" / "json.md").read_text()
    text = page.partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `([^`]+)` \| ([^|]+) \|", text, re.MULTILINE)
    return {field: set(kinds.split(" or ")) for field, kinds in rows}


def fields_of(value: Any, known: Fields, path: str = "") -> Iterator[tuple[str, str]]:
    """Each field and its type, by the name that the page has for it."""
    if path:
        yield path, TYPES[type(value)]
    if "any" in known.get(path, set()):
        return
    for key, inner in value.items() if isinstance(value, dict) else ():
        name = f"{path}.{key}" if path else key
        any_name = f"{path}.*"
        known_as = any_name if name not in known and any_name in known else name
        yield from fields_of(inner, known, known_as)
    for inner in value if isinstance(value, list) else ():
        yield from fields_of(inner, known, f"{path}[]")


def hold(section: str, *documents: Any) -> None:
    """All that the documents have is on the page, and all that the page has is in one of them."""
    known, seen = documented(section), {}
    for document in documents:
        for field, kind in fields_of(json.loads(json.dumps(document)), known):
            assert field in known, f"docs/json.md, {section}: there is no {field}"
            assert {kind, "any"} & known[field], f"{section}: {field} is {kind}"
            seen.setdefault(field, set()).add(kind)
    assert known.keys() - seen.keys() == set(), section


def answer(*words: object, code: int = 0) -> Any:
    done = CliRunner().invoke(app, [*map(str, words), "--json"], catch_exceptions=False)
    assert done.exit_code == code, done.output
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    path, shape = tmp_path_factory.mktemp("json"), Geometry()
    base = write_base(path / "base", random_tensors(shape), shape.config)
    factors = random_factors(shape.linear, dict.fromkeys(shape.linear, 2))
    return base, write_adapter(path / "adapter", factors, r=2, lora_alpha=4)


def test_errors(tmp_path: Path) -> None:
    error = answer("plan", tmp_path / "none", tmp_path / "nothing", code=2)
    hold("When it went wrong", error)


def test_plan(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    pins = tmp_path / "pins.json"
    pins.write_text('{"model.layers.0": "cpu"}')
    whole = answer("plan", *inputs, "--storage-bandwidth", "1GB/s", "--dtype", "float16")
    pinned = answer("plan", *inputs, "--device-map", pins, "--shard-size", "20kB")
    noted = {**whole, "notes": ["a note"]}
    hold("plan", whole, pinned, noted)


def test_merge_verify_status_and_report(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    out, page = tmp_path / "out", tmp_path / "page.html"
    words = ("merge", *inputs, "--out", out, "--address", "inline", "--dtype", "float16")
    words += ("--shard-size", "20kB")
    stage = answer(*words, "--layers", "0")
    stopped = answer("status", out)
    done = answer(*words)
    again = answer(*words)
    hold("merge", stage, {**done, "notes": ["a note"]}, again)
    checked = answer("verify", out)
    finished = answer("status", out)
    hold("report", answer("report", out, "--output", page))
    file = min(out.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1] + bytes([file.read_bytes()[-1] ^ 1]))
    hold("verify", checked, answer("verify", out, code=3))
    hold("status", stopped, finished, running(inputs, tmp_path / "running"))


def running(inputs: tuple[Path, Path], out: Path) -> Any:
    """The status of a merge at work, seen from within."""
    seen = []

    def watch(now: Progress) -> None:
        if now.phase == "merging" and now.workers:
            status = read_status(locate(out))
            content = {**status.progress, **dataclasses.asdict(now), "lines": [(1.0, "a decision")]}
            seen.append(status_document(replace(status, progress=content)))

    merge(make_plan(inputs[0], [inputs[1]]), out, choice=TWO_LANES, watch=watch)
    return seen[-1]


def test_doctor(inputs: tuple[Path, Path], tmp_path: Path, small: MergePlan) -> None:
    here = answer("doctor", *inputs, "--out", tmp_path / "out")
    taken = replace(FULL, processes=(GpuProcess(pid=1, name="train", used=None),))
    scratch = ScratchSight(folder="/s", room=7)
    full = ScratchSight(folder="/s", refusal=Problem("belongs to somebody else", "/s", "Give"))
    gone = replace(
        LOOKED, inputs=(replace(BASE, error="No such file or directory"),), scratch=scratch
    )
    refused = node("n5", paths=replace(LOOKED, scratch=full))
    found = checkup(
        refused,
        node("n1", ray_gpus=1, gpus=(taken,), views=(GPU,)),
        node("n2", examination=LATE, paths=gone),
        node("n3", leaves_in=20.0, examination=None, paths=None),
        node("n4", examination=replace(DRIVER, raymeld="9"), paths=None),
        plan=small,
    )
    document = report_document(found, diagnose(found))
    hold("doctor", here, document, {**document, "notes": document["problems"]})


def test_jobs() -> None:
    job = Job(
        name="raymeld-1f0c52aa9be3-1",
        status="RUNNING",
        words="merge a b --out c",
        message="",
        started=1.0,
        ended=None,
        driver_exit_code=None,
        submission="x",
    )
    ended = replace(job, status="SUCCEEDED", ended=2.0, driver_exit_code=0)
    hold("jobs status", _document(job), _document(ended))
    hold("jobs list", {"ok": True, "jobs": [_document(job)]})


def test_a_field_that_nobody_described_is_found() -> None:
    with pytest.raises(AssertionError, match="there is no more"):
        hold("report", {"ok": True, "more": 1})
    with pytest.raises(AssertionError, match="bytes is string"):
        hold("report", {"ok": True, "bytes": "1"})
    with pytest.raises(AssertionError, match="outcome"):
        hold("report", {"ok": True})

"""A merge in stages: some files at a time, and in the end the bytes of one merge."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cluster.cli import app
from merge_core.errors import InputError
from merge_core.merge import merge
from merge_core.plan import MergePlan
from merge_core.planner import make_plan
from merge_core.progress import Progress
from merge_core.stages import layers_of, shards_of
from merge_core.verify import LEVELS, verify

FILES = 70_000


@pytest.fixture
def whole(plan: MergePlan, tmp_path: Path) -> Path:
    out = tmp_path / "whole"
    merge(plan, out)
    return out


def published(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}


def test_stages_in_any_order_end_in_the_bytes_of_one_merge(
    base: Path, adapter: Path, whole: Path, out: Path
) -> None:
    for layers, deferred in (("1", "0,rest"), ("rest", "0"), ("0", "")):
        plan = make_plan(base, [adapter], shard_bytes=FILES, layers=layers)

        result = merge(plan, out)

        assert layers_of(plan, result.deferred) == deferred
        assert (result.verified is None) == bool(deferred)
        assert (out / "config.json").exists() == (not deferred)

    assert published(out) == published(whole)
    assert result.resumed == len(plan.shards) - 1


def test_a_stage_that_was_done_does_nothing_again(base: Path, adapter: Path, out: Path) -> None:
    plan = make_plan(base, [adapter], shard_bytes=FILES, layers="0")
    first = merge(plan, out)
    written = {path.name: path.stat().st_mtime_ns for path in out.glob("*.safetensors")}

    again = merge(plan, out)

    assert (again.resumed, again.deferred) == (len(first.receipts), first.deferred)
    assert {path.name: path.stat().st_mtime_ns for path in out.glob("*.safetensors")} == written


def test_without_layers_everything_that_is_left_is_merged(
    base: Path, adapter: Path, whole: Path, out: Path
) -> None:
    merge(make_plan(base, [adapter], shard_bytes=FILES, layers="rest"), out)

    result = merge(make_plan(base, [adapter], shard_bytes=FILES), out)

    assert result.deferred == ()
    assert published(out) == published(whole)


def test_a_file_is_made_with_the_first_of_its_layers(base: Path, adapter: Path) -> None:
    plan = make_plan(base, [adapter], shard_bytes=10**9, layers="0")

    assert (len(plan.shards), plan.stage) == (1, frozenset({0}))


@pytest.mark.parametrize(
    ("layers", "said"),
    [
        ("2", "the result has no layers 2. It has layers 0-1,rest"),
        ("0-7", "the result has no layers 2-7"),
        ("1-0", "'1-0' names no layers"),
        ("", "'' names no layers"),
        ("all", "'all' names no layers"),
        ("0,,1", "'' names no layers"),
        ("-1", "'-1' names no layers"),
    ],
)
def test_layers_that_are_none_are_refused(
    base: Path, adapter: Path, layers: str, said: str
) -> None:
    with pytest.raises(InputError) as caught:
        make_plan(base, [adapter], shard_bytes=FILES, layers=layers)

    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("layers", "spelled"),
    [("0", "0"), ("0-1,rest", "0-1,rest"), (None, "0-1,rest")],
)
def test_layers_are_spelled_as_they_are_given(
    plan: MergePlan, layers: str | None, spelled: str
) -> None:
    assert layers_of(plan, shards_of(plan.shards, layers)) == spelled


def test_the_command_says_what_is_deferred_and_how_to_go_on(
    base: Path, adapter: Path, out: Path
) -> None:
    words = [str(base), str(adapter), "--shard-size", "70KB", "--out", str(out), "--layers"]
    inline = ["merge", "--address", "inline", "--quiet", *words]

    planned = CliRunner().invoke(app, ["plan", *words, "0"])
    first = CliRunner().invoke(app, [*inline, "0"])
    between = CliRunner().invoke(app, ["plan", *words, "1"])
    again = CliRunner().invoke(app, ["plan", *words, "0"])
    other = CliRunner().invoke(app, ["plan", *words, "0", "--dtype", "float32"])
    second = CliRunner().invoke(app, [*inline, "1,rest", "--json"])

    assert "stage    1 of 4 files now: 0\ndeferred 3 files: 1,rest\n" in planned.stdout
    done = CliRunner().invoke(app, ["plan", *words, "0", "--json"])
    said = "stage    1 of 4 files now: 1,rest\nthere    1 file: 0\ndeferred 2 files: rest\n"
    assert said in between.stdout
    assert "stage    0 of 4 files now\nthere    1 file: 0\ndeferred 3 files" in again.stdout
    assert "there    " not in other.stdout
    files = [(shard["there"], shard["deferred"]) for shard in json.loads(done.stdout)["shards"]]
    assert files == [(True, False)] * 4
    assert first.exit_code == second.exit_code == 0
    assert f"deferred 3 files: 1,rest; until they are merged {out} is no checkpoint" in first.stdout
    assert "next     the same command with --layers 1,rest, or without --layers" in first.stdout
    assert "result   " not in first.stdout
    document = json.loads(second.stdout)
    assert (document["deferred"], document["resumed"]) == ([], 1)


def test_a_stage_counts_its_own_files_alone(base: Path, adapter: Path, out: Path) -> None:
    plan = make_plan(base, [adapter], shard_bytes=FILES, layers="rest")
    seen: list[Progress] = []

    merge(plan, out, watch=seen.append)

    merging = [now for now in seen if now.phase == "merging"]
    assert {now.total for now in merging} == {sum(plan.shards[n].size for n in plan.stage)}
    assert 0 <= merging[0].done <= merging[-1].done <= merging[-1].total


@pytest.mark.parametrize("level", LEVELS)
def test_a_verification_between_two_stages_says_only_that_the_merge_is_unfinished(
    base: Path, adapter: Path, out: Path, level: str
) -> None:
    merge(make_plan(base, [adapter], shard_bytes=FILES, layers="rest"), out)

    report = verify(out, level)

    said = "this is an unfinished merge: the same merge command again goes on from here"
    assert [finding.what for finding in report.findings] == [said]


def test_a_stage_asks_for_no_device_that_only_others_are_pinned_to(
    base: Path, adapter: Path, tmp_path: Path, out: Path
) -> None:
    devices = {"": "cpu", "model.layers.1": "cuda"}
    (tmp_path / "map.json").write_text(json.dumps(devices))
    options: Any = {"shard_bytes": FILES, "device_map": tmp_path / "map.json"}

    stage = make_plan(base, [adapter], layers="0", **options)

    assert make_plan(base, [adapter], **options).pinned == {"cpu", "cuda"}
    assert stage.pinned == {"cpu"}
    assert merge(stage, out, device="cpu").deferred != ()

"""What a person sees: talk on stderr, the answer on stdout, errors in one paragraph."""

from __future__ import annotations

import dataclasses
import json
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from handmade import (
    TWO_LANES,
    Geometry,
    published,
    random_factors,
    random_tensors,
    write_adapter,
    write_base,
)

from cluster import console
from cluster.pools import EligiblePool
from merge_core.errors import InputError, Problem, StorageError
from merge_core.merge import MergeResult, merge
from merge_core.plan import MergePlan
from merge_core.planner import make_plan

GEOMETRY = Geometry(layers=4)
MODULES = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    path = tmp_path_factory.mktemp("console")
    factors = random_factors(GEOMETRY.linear, dict.fromkeys(GEOMETRY.linear, 4))
    return (
        write_base(path / "base", random_tensors(GEOMETRY), GEOMETRY.config),
        write_adapter(path / "adapter", factors, r=4, lora_alpha=8),
    )


@pytest.fixture(scope="module")
def one_file(inputs: tuple[Path, Path]) -> MergePlan:
    return make_plan(inputs[0], [inputs[1]])


@pytest.fixture(scope="module")
def a_file_a_layer(inputs: tuple[Path, Path]) -> MergePlan:
    """Embeddings, four layers, norm and head."""
    return make_plan(inputs[0], [inputs[1]], shard_bytes=1)


@pytest.fixture(scope="module")
def merged(a_file_a_layer: MergePlan, tmp_path_factory: pytest.TempPathFactory) -> MergeResult:
    return merge(a_file_a_layer, tmp_path_factory.mktemp("merged") / "out", choice=TWO_LANES)


def placed(result: MergeResult, *devices: str) -> MergeResult:
    """As if each shard had been merged on that device."""
    receipts = [
        dataclasses.replace(receipt, device=device, host="node", worker="w")
        for receipt, device in zip(result.receipts, devices, strict=True)
    ]
    return dataclasses.replace(result, receipts=tuple(receipts))


@pytest.mark.parametrize(
    ("devices", "layers"),
    [
        ("aaaaaaa", [("layers 0-3", "a")]),
        ("aaabbaa", [("layers 0-1", "a"), ("layers 2-3", "b")]),
        ("aabaaaa", [("layers 0", "a"), ("layers 1", "b"), ("layers 2-3", "a")]),
    ],
)
def test_the_device_map_joins_runs_of_layers_on_one_device(
    merged: MergeResult, a_file_a_layer: MergePlan, devices: str, layers: list[tuple[str, str]]
) -> None:
    rows = console.device_map(placed(merged, *devices), a_file_a_layer)

    assert rows[:-1] == [(span, f"{device} on node (w)") for span, device in layers]
    assert rows[-1] == ("embeddings, final norm and head", "a on node (w)")


def test_what_lies_outside_the_layers_names_every_device(
    merged: MergeResult, a_file_a_layer: MergePlan
) -> None:
    rows = console.device_map(placed(merged, *"abbbbca"), a_file_a_layer)

    assert rows[-1][1] == "a on node (w); c on node (w)"


@pytest.mark.parametrize(("kind", "files"), [("one_file", "1 file"), ("a_file_a_layer", "7 files")])
def test_the_plan_says_what_becomes_what(
    request: pytest.FixtureRequest, inputs: tuple[Path, Path], kind: str, files: str
) -> None:
    plan: MergePlan = request.getfixturevalue(kind)
    pools = [
        EligiblePool(name="cpu", lanes=4, reason="4 lanes"),
        EligiblePool(name="cuda:0 T4", lanes=0, reason="too small"),
    ]
    size = sum(shard.size for shard in plan.shards) / 1e6
    stored = (inputs[0] / "model.safetensors").stat().st_size
    lines = console.plan_lines(dataclasses.replace(plan, notes=("mind [this]",)), pools)

    assert lines == [
        f"base     {inputs[0]}: Qwen2ForCausalLM, 1 file, {stored / 1e6:.2f} MB",
        f"adapter  {inputs[1]}, weight 1: LORA",
        f"         low-rank factors on 28 tensors: {', '.join(MODULES)}",
        f"result   {files}, {size:.2f} MB: 28 tensors merged, 23 copied",
        "pool     cpu: 4 lanes",
        "pool     cuda:0 T4: not eligible: too small",
        "note     mind [this]",
    ]
    document = console.plan_document(plan, pools)
    assert sum(shard["merged"] for shard in document["shards"]) == 28
    assert sum(shard["tensors"] for shard in document["shards"]) == 51
    ways = {"merged": 28, "replaced": 0, "decoded": 0, "converted": 0, "copied": 23, "added": 0}
    assert document["tensors"] == ways
    (told,) = document["adapters"]
    assert {kind: len(names) for kind, names in told["touches"].items()} == {"low-rank factors": 28}


def test_the_result_says_where_what_and_how_proven(
    merged: MergeResult, a_file_a_layer: MergePlan
) -> None:
    result = dataclasses.replace(merged, seconds=1.25)
    lines = console.result_lines(result, a_file_a_layer)
    size = sum(shard.size for shard in a_file_a_layer.shards) / 1e6

    assert result.verified is not None
    assert lines[0].startswith("layers 0-3: cpu on ")
    assert lines[-4:] == [
        f"merged   28 tensors, {size:.2f} MB in 1.2 s, plan {merged.fingerprint[:12]}",
        *console._change_lines(result),
        f"verified digest: {'; '.join(result.verified.checks)}",
        f"result   {merged.out}",
    ]


def test_the_result_says_how_much_changed_and_what_an_untrained_adapter_left_alone(
    merged: MergeResult,
) -> None:
    norms = iter([(3.0, 0.3), (4.0, 0.0), (0.0, 0.0)])
    first, *rest = [t for r in merged.receipts for t in r.tensors if t.delta_norm is not None]
    rows = [
        dataclasses.replace(row, base_norm=base, delta_norm=delta)
        for row, (base, delta) in zip((first, *rest), norms, strict=False)
    ]
    receipt = dataclasses.replace(merged.receipts[0], tensors=tuple(rows))

    assert console._change_lines(dataclasses.replace(merged, receipts=(receipt,))) == [
        f"changed  by 6.00% of their norm, most in {first.tensor}: 10.00%",
        "note     1 tensor did not change: the delta is zero",
    ]


def test_a_result_that_was_there_says_so(merged: MergeResult, a_file_a_layer: MergePlan) -> None:
    again = dataclasses.replace(merged, verified=None, receipts=())

    assert console.result_lines(again, a_file_a_layer) == [
        f"{merged.out} already holds this merge ({merged.fingerprint[:12]}); nothing done"
    ]
    document = console.result_document(again, a_file_a_layer)
    assert (document["already_there"], document["verified"]) == (True, None)


def test_an_error_is_a_paragraph_on_stderr_and_a_document_on_stdout(
    capsys: pytest.CaptureFixture[str],
) -> None:
    error = StorageError("no [bold]space[/]", "/data/out", "Free space there.")
    console.complain(error, as_json=False)
    assert capsys.readouterr() == ("", f"error: {error}\n")

    console.complain(error, as_json=True)
    out, err = capsys.readouterr()
    assert err == "error: /data/out: no [bold]space[/]. Free space there.\n"
    assert json.loads(out) == {"ok": False, "error": str(error), "exit_code": 1}


def test_several_problems_are_numbered(capsys: pytest.CaptureFixture[str]) -> None:
    problems = [Problem(f"is {n}", f"file {n}", "Mend it.") for n in ("torn", "gone")]
    console.complain(InputError(problems), as_json=False)

    assert capsys.readouterr().err.splitlines() == [
        "error: 2 problems:",
        "  1. file torn: is torn. Mend it.",
        "  2. file gone: is gone. Mend it.",
    ]


def raymeld(inputs: tuple[Path, Path], out: Path, **streams: Any) -> subprocess.Popen[bytes]:
    command = [str(Path(sys.executable).with_name("raymeld")), "merge", *map(str, inputs)]
    kept = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR")}
    environment = {**kept, "TERM": "xterm", "HOME": str(out.parent)}
    words = [*command, "--out", str(out), "--address", "inline", "--device", "cpu"]
    return subprocess.Popen(words, env=environment, cwd=out.parent, **streams)


def test_a_merge_on_a_terminal_and_one_without_end_well_and_only_one_draws(
    inputs: tuple[Path, Path], merged: MergeResult, tmp_path: Path
) -> None:
    ours, theirs = pty.openpty()
    drawn = raymeld(inputs, tmp_path / "drawn", stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    pipe = subprocess.PIPE
    plain = raymeld(inputs, tmp_path / "plain", stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe)
    shown = b""
    while piece := read(ours):
        shown += piece
    os.close(ours)
    out, err = plain.communicate(timeout=60)

    assert drawn.wait(timeout=60) == 0, shown
    assert b"\x1b[" in shown
    assert b"merged   28 tensors" in shown
    assert shown.count(b"\x1b[?25h") >= shown.count(b"\x1b[?25l")  # the cursor is back
    assert plain.returncode == 0, err
    assert b"merged   28 tensors" in out
    assert b"result   1 file" in err
    assert b"\x1b" not in out + err
    assert b"\r" not in out + err
    assert published(tmp_path / "drawn") == published(tmp_path / "plain")


def read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65536)
    except OSError:  # Linux ends a pseudo-terminal with EIO
        return b""

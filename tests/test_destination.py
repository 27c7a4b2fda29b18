"""Where a result may go, and when what lies there already counts as this very result."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from handmade import (
    TWO_LANES,
    Geometry,
    published,
    random_factors,
    random_tensors,
    write_adapter,
    write_base,
)
from scenes import SMALL, BaseScene, Scene, adapter_of
from typer.testing import CliRunner

from cluster.cli import app
from merge_core.errors import InputError
from merge_core.factors import seal
from merge_core.lease import Lease
from merge_core.merge import MergeResult, merge
from merge_core.planner import make_plan
from merge_core.stores.location import Location, locate

GEOMETRY = Geometry(layers=1)
FACTORS = random_factors(GEOMETRY.linear, {"model.layers.0.mlp.up_proj": 2})


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_base(tmp_path / "base", random_tensors(GEOMETRY), GEOMETRY.config)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "adapter", FACTORS, r=2)


def run(base: Path, adapter: Path, out: Path) -> MergeResult:
    return merge(make_plan(base, [adapter]), out, choice=TWO_LANES)


def test_a_destination_that_no_file_system_could_hold_is_refused(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    (tmp_path / "circle").symlink_to("circle")
    (tmp_path / "file").write_text("mine")
    impossible = {
        "x" * 300: "OUT cannot be made .*too long",
        "null\0byte": "is no path",
        "circle": "OUT cannot be made .*oop",
        "file": "OUT is a file",
        "file/below/it": r"OUT lies below a file \(.*/file\)",
    }
    for name, message in impossible.items():
        with pytest.raises(InputError, match=message):
            run(base, adapter, tmp_path / name)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_destination_behind_a_link_is_written_where_the_link_points(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")

    run(base, adapter, tmp_path / "link" / "deep" / "out")

    assert (tmp_path / "disk" / "deep" / "out" / "config.json").exists()


def test_moved_inputs_and_a_touched_adapter_are_the_same_merge(
    base: Path, adapter: Path, tmp_path: Path, out: Path
) -> None:
    run(base, adapter, out)
    moved = adapter.rename(tmp_path / "moved")
    for path in moved.iterdir():  # read as a whole by every merge, so its times do not matter
        os.utime(path, (1, 1))

    assert run(base.rename(tmp_path / "elsewhere"), moved, out).receipts == ()


def test_a_touched_base_is_not_taken_for_the_same(base: Path, adapter: Path, out: Path) -> None:
    run(base, adapter, out)
    os.utime(base / "model.safetensors", (1, 1))

    with pytest.raises(InputError, match="from input files of other times"):
        run(base, adapter, out)


def test_another_base_with_the_same_headers_is_another_merge(
    base: Path, adapter: Path, tmp_path: Path, out: Path
) -> None:
    """Two models trained from one, such as a base and its chat model, differ in values alone."""
    run(base, adapter, out)
    before = published(out)
    other = write_base(tmp_path / "chat", random_tensors(GEOMETRY, seed=9), GEOMETRY.config)

    with pytest.raises(InputError, match=r"of the same plan .* from input files of other times"):
        run(other, adapter, out)
    assert published(out) == before


def test_another_tokenizer_of_the_same_size_is_another_merge(
    base: Path, adapter: Path, out: Path
) -> None:
    run(base, adapter, out)
    (base / "tokenizer.json").write_text('{"version": "2.0"}')

    with pytest.raises(InputError, match=r"of the same plan .* from input files of other times"):
        run(base, adapter, out)


@pytest.mark.parametrize("change", ["adapter values", "adapter weight", "alpha", "dtype", "shards"])
def test_whatever_else_changes_a_byte_makes_another_merge(
    change: str, base: Path, adapter: Path, out: Path
) -> None:
    run(base, adapter, out)
    named, options = str(adapter), {}
    if change == "adapter values":
        write_adapter(adapter, {n: (a, torch.neg(b)) for n, (a, b) in FACTORS.items()}, r=2)
    elif change == "adapter weight":
        named = f"{adapter}@0.5"
    elif change == "alpha":
        write_adapter(adapter, FACTORS, r=2, lora_alpha=9)
    elif change == "dtype":
        options = {"dtype": "float32"}
    else:
        options = {"shard_bytes": 4000}

    with pytest.raises(InputError, match="holds a finished merge of plan"):
        merge(make_plan(base, [named], **options), out)


def test_out_may_not_lie_in_what_is_read(scene: BaseScene, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(scene.base)
    for out in (scene.base, scene.base / "out", tmp_path, tmp_path / "link" / "out"):
        scene.out = out
        assert f"OUT and BASE ({scene.base}) lie in one another" in scene.refusal()
    scene.out = scene.adapter / "out"
    assert f"OUT and ADAPTER ({scene.adapter}) lie in one another" in scene.refusal()


def test_out_that_is_not_ours_is_left_alone(scene: BaseScene) -> None:
    scene.out.write_text("mine")
    assert "OUT is a file" in scene.refusal()
    scene.out.unlink()
    scene.out.mkdir()
    (scene.out / "thesis.txt").write_text("mine")
    for overwrite in (False, True):
        text = scene.refusal(overwrite=overwrite)
        assert "OUT is not empty, and raymeld did not make it" in text


def test_an_unfinished_merge_of_another_plan_in_out_is_refused_with_both_fingerprints(
    scene: BaseScene, tmp_path: Path
) -> None:
    first = scene.merge().fingerprint
    (scene.out / "config.json").unlink()
    scene.adapter = adapter_of(SMALL, tmp_path / "other", seed=2)
    second = Scene(scene.base, scene.adapter, tmp_path / "elsewhere").merge().fingerprint

    said = f"OUT holds an unfinished merge of plan {first[:12]}; this one is {second[:12]}"
    assert said in scene.refusal()


def test_a_finished_merge_of_which_files_are_missing_is_refused(scene: BaseScene) -> None:
    fingerprint = scene.merge().fingerprint
    next(scene.out.glob("*.safetensors")).unlink()

    said = f"of this very plan {fingerprint[:12]}, but its files are missing or changed"
    assert said in scene.refusal()


def test_a_merge_that_is_already_there_is_not_done_again(scene: BaseScene) -> None:
    first = scene.merge()
    times = {path: path.stat().st_mtime_ns for path in scene.out.rglob("*")}
    again = scene.merge()
    assert (again.verified, again.receipts) == (None, ())
    assert again.fingerprint == first.fingerprint
    assert {path: path.stat().st_mtime_ns for path in scene.out.rglob("*")} == times


def test_another_merge_in_out_is_replaced_only_when_asked(scene: BaseScene, tmp_path: Path) -> None:
    first = scene.merge()
    (scene.out / "notes.txt").write_text("mine")
    scene.adapter = adapter_of(SMALL, tmp_path / "other", seed=2)
    elsewhere = Scene(scene.base, scene.adapter, tmp_path / "elsewhere")
    second = elsewhere.merge()
    text = scene.refusal()
    for said in (first.fingerprint[:12], second.fingerprint[:12], "a finished", "--overwrite"):
        assert said in text
    scene.merge(overwrite=True)
    assert published(scene.out) == {**published(elsewhere.out), "notes.txt": b"mine"}


def test_a_plan_and_a_doctor_tell_what_lies_in_out(base: Path, adapter: Path, out: Path) -> None:
    def told(words: Sequence[Path | str]) -> str:
        done = CliRunner().invoke(app, list(map(str, words)))
        assert done.exit_code == 0, done.output
        return done.stdout

    run(base, adapter, out)
    fingerprint = seal(make_plan(base, [adapter])).fingerprint[:12]
    finished = f"{out}: holds a finished merge, of plan {fingerprint}. The same merge finds that it"
    for words in (["plan", base, adapter], ["doctor", base, adapter], ["doctor"]):
        assert finished in told([*words, "--out", out])

    (out / "config.json").unlink()
    with Lease(locate(out), lambda _: None) as lease:
        for words in (["plan", base, adapter], ["doctor", base, adapter], ["doctor"]):
            said = told([*words, "--out", out])
            assert f"{out}: holds an unfinished merge, of plan {fingerprint}. The same" in said
            assert f"{out}: {lease.holder} is merging into it. Wait for it" in said
    assert "is merging" not in told(["doctor", "--out", out])


def test_a_doctor_tells_of_an_out_that_is_not_ours_also_without_a_plan(out: Path) -> None:
    out.mkdir()
    (out / "mine").touch()

    done = CliRunner().invoke(app, ["doctor", "--out", str(out)])

    assert done.exit_code == 1
    assert f"{out}: OUT is not empty, and raymeld did not make it" in done.stdout


def test_an_out_that_cannot_be_looked_at_is_told_by_its_name_with_the_store_s_own_advice(
    base: Path, adapter: Path, s3: Location
) -> None:
    access, out = str(s3.access.endpoint_url), "s3://nowhere/out"
    words = [str(base), str(adapter), "--out", out, "--endpoint-url", access]
    done = CliRunner().invoke(app, ["merge", *words, "--address", "inline"])
    said = f"{out}: there is no such bucket. Check its name"
    assert (done.exit_code, said in done.stderr) == (2, True)


@pytest.mark.parametrize(
    ("out", "named"),
    [
        (["s3://b/out"], "s3://b/out: OUT"),
        (["hf://me/m", "--state", "s3://b/k"], "s3://b/k: STATE"),
    ],
)
def test_nobody_may_write_without_a_signature_and_no_server_is_asked(
    base: Path, adapter: Path, out: list[str], named: str
) -> None:
    words = [str(base), str(adapter), "--anonymous", "--endpoint-url", "http://127.0.0.1:1"]
    wanted = f"{named} is to be written to, and --anonymous signs nothing. Leave --anonymous out"
    done = CliRunner().invoke(app, ["plan", *words, "--out", *out])
    assert (done.exit_code, wanted in done.stderr) == (2, True)

    inline = ["--address", "inline", "--verify", "numeric"]
    done = CliRunner().invoke(app, ["merge", *words, "--out", *out, *inline])
    assert (done.exit_code, wanted in done.stderr) == (2, True)
    assert ("--verify numeric: reads the whole" in done.stderr) == (len(out) > 1)  # all at once

"""Bases and destinations that a merge must refuse: exit code 2, one paragraph, nothing written."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
from handmade import (
    INDEX,
    TWO_LANES,
    Geometry,
    assert_no_checkpoint,
    files_below,
    header_of,
    published,
    random_factors,
    random_tensors,
    rewrite_header,
    write_adapter,
    write_base,
    write_json,
)
from models import edit_json
from safetensors.torch import load_file, save_file

from merge_core.errors import InputError, StorageError
from merge_core.merge import MergeResult, merge
from merge_core.planner import make_plan

SMALL = Geometry(layers=1)
ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
Q = "model.layers.0.self_attn.q_proj"


@dataclass
class Scene:
    """A merge, of which each test spoils something."""

    base: Path
    adapter: Path
    out: Path

    def merge(self, *, overwrite: bool = False) -> MergeResult:
        plan = make_plan(self.base, [self.adapter])
        return merge(plan, self.out, device="cpu", choice=TWO_LANES, overwrite=overwrite)

    def refusal(self, *, overwrite: bool = False) -> str:
        """What the merge is refused with; OUT is as it was."""
        before = files_below(self.out) if self.out.is_dir() else self.out.exists()
        with pytest.raises(InputError) as caught:
            self.merge(overwrite=overwrite)
        assert caught.value.exit_code == 2
        assert before == (files_below(self.out) if self.out.is_dir() else self.out.exists())
        text = str(caught.value)
        text.encode()  # can be printed
        return text

    def map_tensor(self, name: str, home: object) -> None:
        index = json.loads((self.base / INDEX).read_text())
        write_json(self.base / INDEX, {"weight_map": {**index["weight_map"], name: home}})

    def configure(self, **fields: object) -> None:
        edit_json(self.base / "config.json", **fields)


@pytest.fixture
def scene(tmp_path: Path, out: Path) -> Scene:
    base = write_base(tmp_path / "base", random_tensors(SMALL), SMALL.config, files=2)
    return Scene(base, adapter_of(SMALL, tmp_path / "adapter"), out)


def adapter_of(geometry: Geometry, path: Path, seed: int = 1) -> Path:
    factors = random_factors(geometry.linear, {Q: 4}, seed=seed)
    return write_adapter(path, factors, r=4, lora_alpha=8)


def shift(file: Path, begin: int, end: int) -> None:
    """Move the second tensor's offsets."""
    header = header_of(file)
    names = sorted(header.keys() - {"__metadata__"}, key=lambda n: header[n]["data_offsets"])
    first, behind = header[names[1]]["data_offsets"]
    header[names[1]]["data_offsets"] = [first + begin, behind + end]
    rewrite_header(file, header)


def name_twice(file: Path) -> None:
    header = header_of(file)
    twin = json.dumps({Q: header[next(k for k in header if k != "__metadata__")]})
    rewrite_header(file, f"{json.dumps(header)[:-1]},{twin[1:-1]},{twin[1:]}".encode())


def claim_header(file: Path, length: int, size: int) -> None:
    with file.open("r+b") as data:
        data.write(length.to_bytes(8, "little") + b"\0")
        data.truncate(size)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda f: os.truncate(f, f.stat().st_size - 1), "truncated: data ends at byte"),
        (lambda f: os.truncate(f, 20), "truncated: the header ends at byte"),
        (lambda f: os.truncate(f, 5), "5 bytes are too few"),
        (lambda f: os.truncate(f, f.stat().st_size + 1), "trailing bytes"),
        (lambda f: shift(f, 0, 2), "its offsets hold"),
        (lambda f: shift(f, 10**12, 10**12), "leaves a hole"),
        (lambda f: shift(f, 2, 2), "leaves a hole"),
        (lambda f: shift(f, -2, -2), "overlaps the tensor before it"),
        (lambda f: claim_header(f, 100_000_001, 4096), "exceeds the format's 100 MB limit"),
        (lambda f: claim_header(f, 100_000_001, 100_000_009), "exceeds the format's 100 MB limit"),
        (lambda f: claim_header(f, 100_000_000, 100_000_008), "is no JSON"),
        (name_twice, f"names '{Q}' twice"),
        (Path.unlink, "which is missing"),
    ],
)
def test_a_damaged_weight_file_is_refused_and_named(
    scene: Scene, damage: Callable[[Path], None], said: str
) -> None:
    damage(scene.base / ONE)
    text = scene.refusal()
    assert said in text
    assert ONE in text
    assert TWO not in text


@pytest.mark.parametrize("home", ["../x", "/etc/passwd", "sub/x", "", ".", "..", 7, None, ["x"]])
def test_an_index_that_leads_out_of_the_checkpoint_is_refused(scene: Scene, home: object) -> None:
    scene.map_tensor("model.norm.weight", home)
    said = f"weight_map puts 'model.norm.weight' into {home!r}, outside the checkpoint"
    assert said in scene.refusal()


def test_an_index_that_names_a_file_that_cannot_be_printed_is_refused(scene: Scene) -> None:
    scene.map_tensor("model.norm.weight", "\ud800.safetensors")
    assert "is no JSON" in scene.refusal()


@pytest.mark.parametrize(
    "index", ["{", "[]", "null", "{}", '{"weight_map": {}}', '{"weight_map": ["x"]}', "[" * 100_000]
)
def test_an_index_without_a_map_is_refused(scene: Scene, index: str) -> None:
    (scene.base / INDEX).write_text(index)
    assert INDEX in scene.refusal()


def test_index_and_files_must_agree_on_the_home_of_every_tensor(scene: Scene) -> None:
    first, second = load_file(scene.base / ONE), load_file(scene.base / TWO)
    twin, extra = min(first), "model.extra"
    save_file({**second, twin: first[twin], extra: first[twin].clone()}, scene.base / TWO)
    scene.map_tensor("model.ghost", ONE)
    text = scene.refusal()
    assert text.startswith("3 problems:")
    assert f"tensor {twin!r} is in {ONE} and in {TWO}" in text
    assert f"tensor 'model.extra' is in {TWO}, the index says no file" in text
    assert f"tensor 'model.ghost' is not in {ONE}, where the index puts it" in text


def test_a_single_file_beside_an_index_is_refused(scene: Scene) -> None:
    save_file(random_tensors(SMALL), scene.base / "model.safetensors")
    assert f"holds both model.safetensors and {INDEX}" in scene.refusal()


@pytest.mark.parametrize(
    ("quantisation", "name"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "awq", "bits": 4}, "awq"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"load_in_8bit": True}, "unknown method"),
        ("int4", "unknown method"),
    ],
)
def test_a_quantised_base_is_refused_by_name(scene: Scene, quantisation: object, name: str) -> None:
    scene.configure(quantization_config=quantisation)
    assert f"config.json: the base is quantised ({name})" in scene.refusal()


def test_a_base_without_safetensors_is_refused(scene: Scene) -> None:
    (scene.base / INDEX).unlink()
    said = f"no weights found: neither model.safetensors nor {INDEX}, only {ONE}, {TWO}"
    assert said in scene.refusal()
    (scene.base / "pytorch_model.bin").write_bytes(b"\x80")
    text = scene.refusal()
    assert "the base is in pytorch_model*.bin" in text
    assert "save_pretrained writes safetensors" in text


def test_what_is_no_base_is_refused(scene: Scene) -> None:
    base = scene.base
    for path, said in (
        (scene.adapter, "is an adapter, not a base"),
        (base / ONE, "BASE is a file"),
        (base / "nowhere", "BASE does not exist"),
    ):
        scene.base = path
        assert f"{path}: {said}" in scene.refusal()
    shutil.copy(scene.adapter / "adapter_config.json", base)
    scene.base = base
    assert f"{base}: holds an adapter beside the base" in scene.refusal()


@pytest.mark.parametrize("config", [b"{", b"", b"[]", b"null", b"{}", b"\xff", b"[" * 100_000])
def test_a_config_that_describes_no_model_is_refused(scene: Scene, config: bytes) -> None:
    (scene.base / "config.json").write_bytes(config)
    assert "config.json" in scene.refusal()


def test_a_missing_config_is_refused(scene: Scene) -> None:
    (scene.base / "config.json").unlink()
    assert "config.json: cannot be read (No such file" in scene.refusal()


@pytest.mark.parametrize(
    "sizes",
    [
        {"hidden_size": "32"},
        {"hidden_size": True},
        {"num_hidden_layers": 0},
        {"num_attention_heads": -4},
        {"head_dim": "8", "num_key_value_heads": "2"},
        {"head_dim": {"x": 1}},
        {"num_key_value_heads": 1.5},
    ],
)
def test_sizes_in_the_config_that_are_no_sizes_are_refused(
    scene: Scene, sizes: dict[str, object]
) -> None:
    scene.configure(**sizes)
    assert str(scene.base) in scene.refusal()


def test_a_config_that_asks_for_a_billion_layers_costs_no_memory(scene: Scene) -> None:
    scene.configure(num_hidden_layers=10**9)
    code = (
        "import resource, sys; from merge_core.planner import make_plan\n"
        f"resource.setrlimit(resource.RLIMIT_AS, ({600 << 20}, {600 << 20}))\n"
        "try: make_plan(sys.argv[1], [sys.argv[2]])\n"
        "except ValueError as error: print(error)"
    )
    command = [sys.executable, "-c", code, scene.base, scene.adapter]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr[-300:]
    assert "1000000000" in done.stdout


def test_a_base_of_another_size_than_its_config_is_refused(scene: Scene) -> None:
    scene.configure(num_hidden_layers=3, vocab_size=81)
    text = scene.refusal()
    assert "the checkpoint lacks model.layers.1.self_attn.q_proj.weight" in text
    assert "and 21 more" in text
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert f"tensor {name!r} has shape [80, 32], config.json asks [81, 32]" in text


def test_every_problem_of_every_file_is_told_at_once(scene: Scene) -> None:
    os.truncate(scene.base / ONE, 20)
    os.truncate(scene.base / TWO, 0)
    scene.configure(quantization_config={"quant_method": "awq"})
    text = scene.refusal()
    assert text.startswith("3 problems:")
    for said in ("awq", f"{ONE}: truncated", f"{TWO}: 0 bytes are too few"):
        assert said in text


def test_out_may_not_lie_in_what_is_read(scene: Scene, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(scene.base)
    for out in (scene.base, scene.base / "out", tmp_path, tmp_path / "link" / "out"):
        scene.out = out
        assert f"OUT and BASE ({scene.base}) lie in one another" in scene.refusal()
    scene.out = scene.adapter / "out"
    assert f"OUT and ADAPTER ({scene.adapter}) lie in one another" in scene.refusal()


def test_out_that_is_not_ours_is_left_alone(scene: Scene) -> None:
    scene.out.write_text("mine")
    assert "OUT is a file" in scene.refusal()
    scene.out.unlink()
    scene.out.mkdir()
    (scene.out / "thesis.txt").write_text("mine")
    for overwrite in (False, True):
        text = scene.refusal(overwrite=overwrite)
        assert "OUT is not empty, and raymeld did not make it" in text


def test_an_unfinished_merge_in_out_is_refused(scene: Scene) -> None:
    fingerprint = scene.merge().fingerprint
    (scene.out / "config.json").unlink()
    assert f"OUT holds an unfinished merge of plan {fingerprint[:12]}" in scene.refusal()


def test_a_merge_that_is_already_there_is_not_done_again(scene: Scene) -> None:
    first = scene.merge()
    times = {path: path.stat().st_mtime_ns for path in scene.out.rglob("*")}
    again = scene.merge()
    assert (again.verified, again.receipts) == (None, ())
    assert again.fingerprint == first.fingerprint
    assert {path: path.stat().st_mtime_ns for path in scene.out.rglob("*")} == times


def test_another_merge_in_out_is_replaced_only_when_asked(scene: Scene, tmp_path: Path) -> None:
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


def promise_space(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))


def test_a_disk_that_is_too_small_is_noticed_before_anything_is_written(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    promise_space(monkeypatch, free=100)
    with pytest.raises(StorageError, match="no space: the result takes") as caught:
        scene.merge()
    assert caught.value.exit_code == 1
    assert not scene.out.exists()


@pytest.fixture
def tiny_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Path]]:
    """A file system of the given size that claims to have room for everything."""
    if os.geteuid() != 0:
        pytest.skip("only root may mount")
    disk = tmp_path / "disk"
    disk.mkdir()
    promise_space(monkeypatch, free=10**12)

    def mount(size: str) -> Path:
        options = f"remount,size={size}" if disk.is_mount() else f"size={size}"
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", disk]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"mount: {done.stderr.strip()}")
        return disk

    try:
        yield mount
    finally:
        if disk.is_mount():
            subprocess.run(["umount", disk], check=True)


def test_a_disk_that_fills_up_under_the_shards_leaves_no_part(
    scene: Scene, tmp_path: Path, tiny_disk: Callable[[str], Path]
) -> None:
    wide = Geometry(layers=1, vocab=4000)
    scene.base = write_base(tmp_path / "wide", random_tensors(wide), wide.config)
    scene.out = tiny_disk("256k") / "out"
    with pytest.raises(StorageError, match="No space left on device") as caught:
        scene.merge()
    assert caught.value.exit_code == 1
    assert "Free space" in str(caught.value)
    assert_no_checkpoint(scene.out)
    assert not list(scene.out.rglob("*.safetensors"))


def test_a_disk_that_fills_up_under_the_plan_can_be_used_again_when_it_has_room(
    scene: Scene, tiny_disk: Callable[[str], Path]
) -> None:
    scene.out = tiny_disk("8k") / "out"
    with pytest.raises(StorageError, match="No space left on device"):
        scene.merge()
    assert_no_checkpoint(scene.out)
    tiny_disk("4m")
    assert scene.merge(overwrite=True).receipts
    assert (scene.out / "config.json").exists()

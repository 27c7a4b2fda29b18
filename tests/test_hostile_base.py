"""A directory that is no base is refused, and all of its problems are told at once."""

from __future__ import annotations

import os
import shutil

from handmade import INDEX, random_tensors
from safetensors.torch import save_file
from scenes import ONE, SMALL, TWO, BaseScene


def test_a_single_file_beside_an_index_is_refused(scene: BaseScene) -> None:
    save_file(random_tensors(SMALL), scene.base / "model.safetensors")
    assert f"holds both model.safetensors and {INDEX}" in scene.refusal()


def test_a_base_without_safetensors_is_refused(scene: BaseScene) -> None:
    (scene.base / INDEX).unlink()
    said = f"no weights found: neither model.safetensors nor {INDEX}, only {ONE}, {TWO}"
    assert said in scene.refusal()
    (scene.base / "pytorch_model.bin").write_bytes(b"\x80")
    text = scene.refusal()
    assert "the base is in pytorch_model*.bin" in text
    assert "save_pretrained writes safetensors" in text


def test_what_is_no_base_is_refused(scene: BaseScene) -> None:
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


def test_every_problem_of_every_file_is_told_at_once(scene: BaseScene) -> None:
    os.truncate(scene.base / ONE, 20)
    os.truncate(scene.base / TWO, 0)
    scene.configure(quantization_config={"quant_method": "awq"})
    text = scene.refusal()
    assert text.startswith("3 problems:")
    for said in ("awq", f"{ONE}: truncated", f"{TWO}: 0 bytes are too few"):
        assert said in text


def test_a_side_file_whose_link_leads_nowhere_is_refused(scene: BaseScene) -> None:
    (scene.base / "vocab.json").symlink_to(scene.base / "blobs" / "0123")
    text = scene.refusal()
    assert f"{scene.base / 'vocab.json'}: is a link that leads nowhere" in text

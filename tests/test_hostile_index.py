"""An index that leads elsewhere, maps nothing, or contradicts the files is refused."""

from __future__ import annotations

import pytest
from handmade import INDEX
from safetensors.torch import load_file, save_file
from scenes import ONE, TWO, BaseScene


@pytest.mark.parametrize("home", ["../x", "/etc/passwd", "sub/x", "", ".", "..", 7, None, ["x"]])
def test_an_index_that_leads_out_of_the_checkpoint_is_refused(
    scene: BaseScene, home: object
) -> None:
    scene.map_tensor("model.norm.weight", home)
    said = f"weight_map puts 'model.norm.weight' into {home!r}, outside the checkpoint"
    assert said in scene.refusal()


def test_an_index_that_names_a_file_that_cannot_be_printed_is_refused(scene: BaseScene) -> None:
    scene.map_tensor("model.norm.weight", "\ud800.safetensors")
    assert "is no JSON" in scene.refusal()


@pytest.mark.parametrize(
    "index", ["{", "[]", "null", "{}", '{"weight_map": {}}', '{"weight_map": ["x"]}', "[" * 100_000]
)
def test_an_index_without_a_map_is_refused(scene: BaseScene, index: str) -> None:
    (scene.base / INDEX).write_text(index)
    assert INDEX in scene.refusal()


def test_index_and_files_must_agree_on_the_home_of_every_tensor(scene: BaseScene) -> None:
    first, second = load_file(scene.base / ONE), load_file(scene.base / TWO)
    twin, extra = min(first), "model.extra"
    save_file({**second, twin: first[twin], extra: first[twin].clone()}, scene.base / TWO)
    scene.map_tensor("model.ghost", ONE)
    text = scene.refusal()
    assert text.startswith("3 problems:")
    assert f"tensor {twin!r} is in {ONE} and in {TWO}" in text
    assert f"tensor 'model.extra' is in {TWO}, the index says no file" in text
    assert f"tensor 'model.ghost' is not in {ONE}, where the index puts it" in text

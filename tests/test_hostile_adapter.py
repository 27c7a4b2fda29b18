"""What is no adapter, and weights that make no sense, are refused with everything else at once."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from handmade import TWO_LANES, published
from models import edit_json
from safetensors.torch import save_file
from scenes import QB, AdapterScene

from merge_core.adapter import parse_adapter
from merge_core.errors import InputError
from merge_core.merge import merge
from merge_core.planner import make_plan
from merge_core.stores.location import locate


def test_what_is_no_adapter_is_refused(adapter_scene: AdapterScene, tmp_path: Path) -> None:
    adapter_scene.adapter = adapter_scene.adapter / "nowhere"
    assert "ADAPTER does not exist" in adapter_scene.refusal()
    adapter_scene.adapter = adapter_scene.base / "config.json"
    assert "ADAPTER is a file" in adapter_scene.refusal()
    adapter_scene.adapter = adapter_scene.base
    assert "is a checkpoint, not an adapter" in adapter_scene.refusal()
    adapter_scene.adapter = tmp_path / "run"
    for name in ("default", "style"):
        (adapter_scene.adapter / name).mkdir(parents=True)
        shutil.copy(tmp_path / "adapter" / "adapter_config.json", adapter_scene.adapter / name)
    text = adapter_scene.refusal()
    assert "has no adapter_config.json; there is one in default, style" in text
    assert str(adapter_scene.adapter / "default") in text


@pytest.mark.parametrize("weight", ["@0", "@-0.0", "@.0", "@" + "9" * 400])
def test_a_weight_that_merges_nothing_sensible_is_refused(
    adapter_scene: AdapterScene, weight: str
) -> None:
    assert "merges nothing sensible" in adapter_scene.refusal(weight)


def test_a_weight_is_read_behind_the_last_at_sign(tmp_path: Path) -> None:
    for text, path, weight in (
        ("a@0.5", "a", 0.5),
        ("a@-.25", "a", -0.25),
        ("a@+2.", "a", 2.0),
        ("me@home/a@0.1", "me@home/a", 0.1),
        ("a@v2", "a@v2", 1.0),
        ("a@-1e-3", "a", -0.001),
        ("a@nan", "a@nan", 1.0),
        ("a@", "a@", 1.0),
    ):
        assert parse_adapter(text) == (locate(path), weight)
    (tmp_path / "a@0.5").mkdir()
    assert parse_adapter(tmp_path / "a@0.5") == (locate(tmp_path / "a@0.5"), 1.0)
    assert parse_adapter(f"{tmp_path}/a@0.5@0.25") == (locate(tmp_path / "a@0.5"), 0.25)


@pytest.mark.parametrize("weight", ["0,5", "50%", "nan", "v2", ""])
def test_what_stands_behind_an_adapter_and_is_no_weight_is_told_as_that(
    tmp_path: Path, weight: str
) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(InputError) as caught:
        parse_adapter(f"{tmp_path}/a@{weight}")
    (problem,) = caught.value.problems
    assert problem.what == f"{weight!r} is no weight"
    assert f"as in {tmp_path}/a@0.5" in problem.remedy


def test_problems_of_base_and_adapters_are_told_at_once(
    adapter_scene: AdapterScene, tmp_path: Path
) -> None:
    other = shutil.copytree(adapter_scene.adapter, tmp_path / "other")
    adapter_scene.configure(use_qalora=True, r=0, bias="some")
    adapter_scene.keep(**{QB: None})
    save_file({}, other / "adapter_model.safetensors")
    base = shutil.copytree(adapter_scene.base, tmp_path / "broken")
    edit_json(base / "config.json", vocab_size=None)
    with pytest.raises(InputError) as caught:
        make_plan(base, [adapter_scene.adapter, f"{other}@0"], dtype="int8")
    found = [problem.what for problem in caught.value.problems]
    for said in ("'int8'", "vocab_size", "QALoRA", "bias is", "r is 0", "weight 0.0", "is empty"):
        assert any(said in what for what in found), said
    assert str(caught.value).startswith(f"{len(found)} problems:\n  1. ")


def test_the_scene_merges_when_nothing_is_spoilt(adapter_scene: AdapterScene) -> None:
    merge(
        make_plan(adapter_scene.base, [adapter_scene.adapter]),
        adapter_scene.out,
        device="cpu",
        choice=TWO_LANES,
    )
    assert "config.json" in published(adapter_scene.out)

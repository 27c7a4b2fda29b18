"""Config, index, tokenizer and licence are verified like the weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from handmade import TWO_LANES, small_merge, write_adapter
from merged_by_hand import found
from models import edit_json
from scenes import DOWN, AdapterScene, Q

from merge_core.commit import Assembly
from merge_core.errors import InputError, VerificationError
from merge_core.merge import merge
from merge_core.plan import MergePlan
from merge_core.planner import make_plan


@pytest.fixture
def plan(tmp_path: Path) -> MergePlan:
    return small_merge(tmp_path / "inputs")


@pytest.fixture
def finished(plan: MergePlan, out: Path) -> Path:
    merge(plan, out, choice=TWO_LANES)
    assert found(out, "numeric") == []
    return out


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a bit flipped": (lambda out: flip(out / "tokenizer.json"), "tokenizer.json"),
    "a file removed": (lambda out: (out / "tokenizer.json").unlink(), "tokenizer.json"),
    "a field of the config": (
        lambda out: edit_json(out / "config.json", rope_theta=7.0),
        "config.json",
    ),
    "the index": (
        lambda out: flip(out / "model.safetensors.index.json"),
        "model.safetensors.index.json",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
@pytest.mark.parametrize("level", ["digest", "numeric"])
def test_a_file_that_is_not_what_the_merge_wrote_is_found(
    finished: Path, name: str, level: str
) -> None:
    damage, where = DAMAGE[name]
    damage(finished)

    assert where in {place for _, place in found(finished, level)}


def test_another_base_is_found_by_its_config_and_its_tokenizer(
    finished: Path, plan: MergePlan
) -> None:
    edit_json(plan.base.local / "config.json", rope_theta=7.0)
    (plan.base.local / "tokenizer.json").write_text("another")

    assert found(finished, "numeric") == [("base", "tokenizer.json"), ("base", "config.json")]


def test_a_config_changes_in_its_dtype_alone(plan: MergePlan, out: Path) -> None:
    edit_json(plan.base.local / "config.json", dtype="bfloat16", torch_dtype="bfloat16")
    again = make_plan(plan.base, [plan.adapters[0].path], dtype="float32")
    merge(again, out, choice=TWO_LANES, level="numeric")

    config = json.loads((out / "config.json").read_text())
    assert (config["dtype"], config["torch_dtype"]) == ("float32", "float32")


def test_a_config_that_names_a_field_twice_is_found(finished: Path) -> None:
    text = (finished / "config.json").read_text()
    (finished / "config.json").write_text('{"model_type": "gpt2", ' + text.lstrip()[1:])

    assert ("config", "config.json") in found(finished, "structure")


def test_an_adapter_beside_the_result_is_found(finished: Path) -> None:
    """Transformers would apply it on top."""
    (finished / "adapter_config.json").write_text("{}")
    (finished / "adapter_model.bin").write_bytes(b"")

    said = [("files", "adapter_config.json"), ("files", "adapter_model.bin")]
    assert found(finished, "structure") == said


@pytest.mark.parametrize("name", ["tokenizer.json", ".raymeld/config.json"])
def test_what_changes_before_the_verification_is_not_published(
    plan: MergePlan, out: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Assembly.write_record

    def write_and_damage(self: Assembly) -> None:
        write(self)
        (out / name).write_text("{}")

    monkeypatch.setattr(Assembly, "write_record", write_and_damage)

    with pytest.raises(VerificationError, match="is not what the merge wrote"):
        merge(plan, out, choice=TWO_LANES)
    assert not (out / "config.json").exists()


def test_a_finished_merge_is_verified_deeper_when_asked(plan: MergePlan, out: Path) -> None:
    merge(plan, out, choice=TWO_LANES, level="structure")
    report = merge(plan, out, choice=TWO_LANES, level="numeric").verified
    assert report is not None
    assert report.level == "numeric"
    flip(out / plan.shards[0].name)

    assert merge(plan, out, choice=TWO_LANES, level="structure").verified is None
    with pytest.raises(VerificationError, match="do not use it"):
        merge(plan, out, choice=TWO_LANES, level="numeric")


def test_what_numeric_cannot_check_is_refused_before_the_merge(
    plan: MergePlan, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("merge_core.verify.adapter_fields._UNDERSTOOD", {"peft_type"})
    monkeypatch.setattr("merge_core.verify.adapter_fields._NO_EFFECT", set())

    with pytest.raises(InputError, match="cannot check lora_alpha = 8"):
        merge(plan, out, choice=TWO_LANES, level="numeric")
    assert not out.exists()


ODD_CONFIGS: dict[str, dict[str, object]] = {
    "alpha below 0": {"lora_alpha": -8, "alpha_pattern": {"down_proj": -2}},
    "PEFT's own spelling of a start": {"init_lora_weights": "Gaussian"},
}


@pytest.mark.parametrize("name", ODD_CONFIGS)
def test_what_merges_right_is_found_right(adapter_scene: AdapterScene, name: str) -> None:
    adapter_scene.configure(**ODD_CONFIGS[name])
    adapter_scene.merge()

    assert found(adapter_scene.out, "numeric") == []


def test_rank_and_alpha_that_are_left_out_are_8(adapter_scene: AdapterScene) -> None:
    torch.manual_seed(0)
    factors = {m: (torch.randn(8, i), torch.randn(o, 8)) for m, o, i in sizes(adapter_scene)}
    write_adapter(adapter_scene.adapter, factors)
    path = adapter_scene.adapter / "adapter_config.json"
    fields = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in fields.items() if k not in ("r", "lora_alpha")}))
    adapter_scene.merge()

    assert found(adapter_scene.out, "numeric") == []


def sizes(scene: AdapterScene) -> list[tuple[str, int, int]]:
    plan = make_plan(scene.base, [scene.adapter])
    shapes = {task.target.name: task.target.shape for task in plan.tasks}
    return [(m, *shapes[f"{m}.weight"]) for m in (Q, DOWN)]  # type: ignore[misc]


def test_a_pickle_of_parameters_is_checked(adapter_scene: AdapterScene) -> None:
    from safetensors.torch import load_file

    old = adapter_scene.adapter / "adapter_model.safetensors"
    parameters = {k: torch.nn.Parameter(v) for k, v in load_file(old).items()}
    torch.save(parameters, old.with_suffix(".bin"))
    old.unlink()
    adapter_scene.merge()

    assert found(adapter_scene.out, "numeric") == []


def test_a_config_with_infinity_is_checked(adapter_scene: AdapterScene) -> None:
    edit_json(adapter_scene.base / "config.json", cutoff=float("inf"))
    adapter_scene.merge()

    assert found(adapter_scene.out, "numeric") == []

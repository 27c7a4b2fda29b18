"""Nothing of an adapter on experts is overlooked, and no other expert is touched."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import Saved, changed, edit_json, read_tensors
from moe import BOTH, PREFIX, apart, write_expert_adapter, write_fused_adapter
from safetensors.torch import load_file

from cluster.explain import adapter_lines, counts_of
from merge_core.errors import InputError
from merge_core.merge import merge
from merge_core.planner import make_plan

Bases = Callable[..., Path]
TARGETS = ["gate_proj", "up_proj", "down_proj", "gate"]


@pytest.fixture(scope="module", params=["of each expert", "of parameters"])
def adapter(request: pytest.FixtureRequest, moe: Bases, tmp_path_factory: Any) -> Path:
    path = tmp_path_factory.mktemp("kind") / "adapter"
    if request.param == "of each expert":
        return write_expert_adapter(path, moe(), TARGETS, lora_alpha=6)
    return write_fused_adapter(path, moe(), swapped=False, peft_version="0.21.0")


def refusal(base: Path, adapter: Path) -> str:
    with pytest.raises(InputError) as caught:
        make_plan(base, [adapter])
    return str(caught.value)


def one_of_each(adapter: Path) -> list[str]:
    """The first key of each kind, whatever the layer and the expert."""
    first: dict[str, str] = {}
    for key in sorted(load_file(adapter / "adapter_model.safetensors")):
        first.setdefault(re.sub(r"\d+", "N", key), key)
    return list(first.values())


CHANGES: dict[str, Callable[[Saved, str], Any]] = {
    "deleted": lambda saved, key: saved.pop(key),
    "in a layer that is not there": lambda saved, key: saved.update(
        {re.sub(r"layers\.\d", "layers.7", key): saved.pop(key)}
    ),
    "of a kind that is not there": lambda saved, key: saved.update({f"{key}.x": saved.pop(key)}),
    "with a row more": lambda saved, key: saved.update(
        {key: torch.cat([saved[key], saved[key][:1]])}
    ),
    "with a column more": lambda saved, key: saved.update(
        {key: torch.cat([saved[key], saved[key][:, :1]], 1)}
    ),
}


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("story", CHANGES)
def test_a_tensor_that_is_changed_is_named(
    story: str, fused: bool, moe: Bases, adapter: Path, tmp_path: Path
) -> None:
    for key in one_of_each(adapter):
        other = changed(adapter, tmp_path / "a", lambda saved, k=key: CHANGES[story](saved, k))

        said = refusal(moe(fused=fused), other)

        module = key.removeprefix(PREFIX).partition(".lora_")[0]
        layer = module.partition(".mlp")[0]
        assert module in said or f"{layer}.mlp.experts" in said, (key, said)


@pytest.mark.parametrize("fused", [False, True])
def test_both_factors_of_an_expert_or_of_a_parameter_may_not_be_lost(
    fused: bool, moe: Bases, adapter: Path, tmp_path: Path
) -> None:
    for key in one_of_each(adapter):
        stem = key.partition("lora_")[0]

        def lose(saved: Saved, stem: str = stem) -> None:
            for side in "AB":
                del saved[f"{stem}lora_{side}.weight"]

        said = refusal(moe(fused=fused), changed(adapter, tmp_path / "a", lose))

        assert "for which the file holds nothing" in said
        assert re.sub(r"(\.base_layer)?\.$", "", stem.removeprefix(PREFIX)) in said


@pytest.mark.parametrize("fused", [False, True])
def test_no_other_expert_is_changed(
    fused: bool, moe: Bases, adapter: Path, tmp_path: Path, out: Path
) -> None:
    """Expert 2 of the first layer is trained alone, or all others have zeros."""
    base, mine = moe(fused=fused), re.compile(r"model\.layers\.0\.mlp\.experts\.2\.")

    def keep(saved: Saved) -> None:
        for key, tensor in list(saved.items()):
            if "experts.lora_A" in key or "base_layer.lora_A" in key:
                tensor.view(4, 3, -1)[[0, 1, 3] if "layers.0" in key else slice(None)] = 0
            elif "base_layer" not in key and "experts.lora" not in key and not mine.search(key):
                del saved[key]

    other = changed(adapter, tmp_path / "a", keep, target_modules=None)
    merge(make_plan(base, [other], shard_bytes=60_000), out, level="numeric")

    before, after = apart(read_tensors(base)), apart(read_tensors(out))
    touched = {name for name in before if not torch.equal(before[name], after[name])}
    layers = ("gate_proj", "up_proj", "down_proj")
    assert touched == {f"model.layers.0.mlp.experts.2.{layer}.weight" for layer in layers}


def fields_of(**changes: Any) -> dict[str, Any]:
    return {"target_parameters": BOTH, **changes}


PROBLEMS: dict[str, tuple[dict[str, Any], str]] = {
    "no parameters": (fields_of(target_parameters=[]), "target_parameters names 0 here"),
    "one parameter": (fields_of(target_parameters=["down_proj"]), "target_parameters names 1"),
    "another rank": (fields_of(r=4), "the base has 4"),
    "a rank that does not fit": (fields_of(r=5), "rank 5 for each expert"),
    "a pattern": (fields_of(rank_pattern={"gate_up_proj": 6}), "with rank 6, the base has 4"),
    "DoRA": (fields_of(use_dora=True), "use_dora is set, with which PEFT trains no parameters"),
    "lora_bias": (fields_of(lora_bias=True), "lora_bias is set, with which PEFT"),
    "no list": (fields_of(target_parameters="x"), "target_parameters is 'x', not a list"),
    "no version": (fields_of(peft_version=19), "peft_version is 19, not a version"),
}


@pytest.mark.parametrize("story", PROBLEMS)
def test_a_config_that_does_not_fit_parameters_is_refused(
    story: str, moe: Bases, tmp_path: Path
) -> None:
    fields, said = PROBLEMS[story]
    adapter = write_fused_adapter(tmp_path / "a", moe(), swapped=False, peft_version="0.21.0")

    edit_json(adapter / "adapter_config.json", **fields)

    assert said in refusal(moe(), adapter)


def test_parameters_of_a_model_that_is_not_known_are_refused(moe: Bases, tmp_path: Path) -> None:
    adapter = write_fused_adapter(tmp_path / "a", moe(), swapped=False)
    base = shutil.copytree(moe(), tmp_path / "base")
    edit_json(base / "config.json", model_type="qwen9_moe")

    assert "of 'qwen9_moe' nothing tells which way it lies" in refusal(base, adapter)


def test_dora_on_experts_that_share_a_tensor_is_refused(moe: Bases, tmp_path: Path) -> None:
    adapter = write_expert_adapter(tmp_path / "a", moe(), ["up_proj"], lora_alpha=6)

    def magnitudes(saved: Saved) -> None:
        for key in [key for key in saved if "lora_B" in key]:
            name = key.replace("lora_B.weight", "lora_magnitude_vector")
            saved[name] = torch.ones(len(saved[key]))

    dora = changed(adapter, tmp_path / "dora", magnitudes, use_dora=True)
    make_plan(moe(), [dora])

    assert "DoRA on one expert of the fused tensor" in refusal(moe(fused=True), dora)


@pytest.mark.parametrize("layer", ["gate_proj", "down_proj"])
def test_factors_of_all_experts_and_of_one_of_them_are_refused(
    layer: str, moe: Bases, tmp_path: Path
) -> None:
    """One would overwrite the other in a tensor that the experts share."""
    fused = write_fused_adapter(tmp_path / "a", moe(), swapped=False, peft_version="0.21.0")
    each = write_expert_adapter(tmp_path / "each", moe(), [layer], rank=3, lora_alpha=6)
    key = f"{PREFIX}model.layers.0.mlp.experts.1.{layer}.lora_A.weight"
    stem, saved_of_each = (
        key.removesuffix("A.weight"),
        load_file(each / "adapter_model.safetensors"),
    )
    one = {name: tensor for name, tensor in saved_of_each.items() if name.startswith(stem)}

    other = changed(fused, tmp_path / "b", lambda saved: saved.update(one))

    said = refusal(moe(fused=True), other)
    assert key in said
    assert "are factors of the same rows of 'model.layers.0.mlp.experts." in said


def test_whole_layers_of_each_expert_go_into_a_base_that_has_them_alone(
    moe: Bases, tmp_path: Path, out: Path
) -> None:
    """As older transformers had them: a fused base has no place for one of them."""
    adapter = write_expert_adapter(tmp_path / "a", moe(), ["q_proj"], lora_alpha=6)
    weights = {n: t + 1 for n, t in read_tensors(moe()).items() if ".experts." in n}

    def whole(saved: Saved) -> None:
        saved.update({f"{PREFIX}{name}": tensor for name, tensor in weights.items()})

    other = changed(adapter, tmp_path / "b", whole, modules_to_save=["experts"])
    merge(make_plan(moe(), [other]), out, level="numeric")

    after = read_tensors(out)
    assert all(torch.equal(after[name], tensor) for name, tensor in weights.items())
    assert "the base has no model.layers.0.mlp.experts.0.down_proj.weight" in refusal(
        moe(fused=True), other
    )


def test_an_expert_whose_number_begins_with_a_zero_is_not_known(moe: Bases, tmp_path: Path) -> None:
    adapter = write_expert_adapter(tmp_path / "a", moe(), ["up_proj"], lora_alpha=6)

    def rename(saved: Saved) -> None:
        for key in [key for key in saved if "layers.0.mlp.experts.1." in key]:
            saved[key.replace("experts.1.", "experts.01.")] = saved[key].clone()

    said = refusal(moe(fused=True), changed(adapter, tmp_path / "b", rename))

    assert "the base has no model.layers.0.mlp.experts.01.up_proj.weight" in said


def test_the_plan_says_what_is_done_to_experts(moe: Bases, tmp_path: Path) -> None:
    fused = write_fused_adapter(tmp_path / "fused", moe(), swapped=False, peft_version="0.21.0")
    each = write_expert_adapter(tmp_path / "each", moe(), ["up_proj", "gate"], lora_alpha=6)

    one = make_plan(moe(), [fused, each])
    other = make_plan(moe(fused=True), [fused, each])

    parameters = "low-rank factors of parameters (target_parameters) on 24 tensors"
    said = "\n".join(adapter_lines(one))
    assert f"{parameters}: down_proj, gate_proj, up_proj" in said
    assert "low-rank factors on 13 tensors: gate, up_proj" in said
    said = "\n".join(adapter_lines(other))
    experts = "low-rank factors of experts on"
    assert f"{experts} 4 tensors: experts.down_proj, experts.gate_up_proj" in said
    assert f"{experts} 2 tensors: experts.gate_up_proj" in said
    assert counts_of(one)["merged"] == 24 + 5
    assert counts_of(other)["merged"] == 4 + 5

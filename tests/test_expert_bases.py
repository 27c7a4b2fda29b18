"""MoE checkpoints are checked against their config, merged alike by any worker, and verified."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from handmade import FOUR_LANES, TWO_LANES, published
from merged_by_hand import found
from models import edit_json
from moe import write_expert_adapter, write_fused_adapter
from safetensors.torch import load_file, save_file
from test_verify_kinds import plant

from merge_core.errors import InputError
from merge_core.factors import FactorSource
from merge_core.layout import TensorSpec
from merge_core.memory import lane_need
from merge_core.merge import merge
from merge_core.planner import make_plan

Bases = Callable[..., Path]
EXPERT = "model.layers.0.mlp.experts.3.up_proj.weight"
FUSED = "model.layers.0.mlp.experts.gate_up_proj"


@pytest.fixture(scope="module")
def adapter(moe: Bases, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("adapter") / "adapter"
    return write_fused_adapter(path, moe(), swapped=False, peft_version="0.21.0")


def spoiled(base: Path, path: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """A copy of a checkpoint in one file, with other tensors."""
    path.mkdir()
    shutil.copy(base / "config.json", path)
    tensors = {k: v for file in base.glob("*.safetensors") for k, v in load_file(file).items()}
    change(tensors)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return path


def cut(name: str) -> Callable[[dict[str, Any]], Any]:
    return lambda tensors: tensors.update({name: tensors[name][:-1].contiguous()})


LACKING: dict[str, tuple[bool, Callable[[dict[str, Any]], Any], str]] = {
    "an expert's layer": (False, lambda t: t.pop(EXPERT), f"lacks {EXPERT}"),
    "a row of an expert": (False, cut(EXPERT), f"{EXPERT!r} has shape [47, 64]"),
    "an expert too many": (
        False,
        lambda t: t.update({EXPERT.replace("3.up", "4.up"): t[EXPERT].clone()}),
        "no place for model.layers.0.mlp.experts.4.up_proj",
    ),
    "the router": (False, lambda t: t.pop("model.layers.2.mlp.gate.weight"), "layers.2.mlp.gate"),
    "the gate of the shared expert": (
        False,
        lambda t: t.pop("model.layers.2.mlp.shared_expert_gate.weight"),
        "lacks model.layers.2.mlp.shared_expert_gate.weight",
    ),
    "an MLP of the dense layer": (
        False,
        lambda t: t.pop("model.layers.1.mlp.up_proj.weight"),
        "lacks model.layers.1.mlp.up_proj.weight",
    ),
    "a fused tensor": (True, lambda t: t.pop(FUSED), f"lacks {FUSED}"),
    "an expert of a fused tensor": (True, cut(FUSED), f"{FUSED!r} has shape [3, 96, 64]"),
}


@pytest.mark.parametrize("story", LACKING)
def test_a_checkpoint_that_is_not_as_its_config_says_is_refused(
    story: str, moe: Bases, adapter: Path, tmp_path: Path
) -> None:
    fused, change, said = LACKING[story]
    base = spoiled(moe(fused=fused), tmp_path / "base", change)

    with pytest.raises(InputError) as caught:
        make_plan(base, [adapter])

    assert said in str(caught.value)


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "no number of experts": ({"num_experts": None}, "no valid num_experts"),
    "no experts": ({"num_experts": 0}, "no valid num_experts"),
    "more experts than tensors": ({"num_experts": 10**9}, "lacks experts: config.json asks for"),
    "a wrong size": ({"moe_intermediate_size": 47}, "config.json asks [47, 64]"),
    "experts in every layer": ({"mlp_only_layers": []}, "lacks model.layers.1.mlp.experts.0"),
    "experts in every other layer": ({"decoder_sparse_step": 2}, "no place for"),
    "layers of no number": ({"mlp_only_layers": "1"}, "no valid mlp_only_layers"),
    "no biases": ({"qkv_bias": False}, "no place for model.layers.0.self_attn"),
}


@pytest.mark.parametrize("story", CONFIGS)
def test_a_config_that_belongs_to_another_checkpoint_is_refused(
    story: str, moe: Bases, adapter: Path, tmp_path: Path
) -> None:
    changes, said = CONFIGS[story]
    base = shutil.copytree(moe(), tmp_path / "base")
    edit_json(base / "config.json", **changes)

    with pytest.raises(InputError) as caught:
        make_plan(base, [adapter])

    assert said in str(caught.value)


@pytest.mark.parametrize("fused", [False, True])
def test_any_number_of_lanes_writes_the_same_bytes(
    fused: bool, moe: Bases, adapter: Path, tmp_path: Path
) -> None:
    plan = make_plan(moe(fused=fused), [adapter], shard_bytes=60_000)
    merge(plan, tmp_path / "one", choice=TWO_LANES)
    expected = published(tmp_path / "one")

    merge(plan, tmp_path / "two", choice=FOUR_LANES)

    assert published(tmp_path / "two") == expected
    assert found(tmp_path / "two", "load") == []


def test_what_experts_share_is_read_once_for_all_of_them(
    moe: Bases, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[str] = []
    load = FactorSource.load

    def counted(self: FactorSource, tensor: TensorSpec, device: Any) -> Any:
        loaded.append(tensor.name)
        return load(self, tensor, device)

    monkeypatch.setattr(FactorSource, "load", counted)
    plan = make_plan(moe(), [adapter], shard_bytes=1 << 30)

    merge(plan, tmp_path / "out", choice=replace(TWO_LANES, lanes=1))

    assert sorted(loaded) == sorted(load_file(adapter / "adapter_model.safetensors"))


def test_what_is_kept_for_experts_counts_as_memory(moe: Bases, adapter: Path) -> None:
    """Four tensors, the largest of which is B of gate_up_proj: [96, 12] in float32."""
    apart, fused = (make_plan(moe(fused=f), [adapter, adapter]) for f in (False, True))

    for plan in (apart, fused):
        need = lane_need(plan, "cpu", 1 << 20)
        assert need.kept == 2 * 4 * 4 * 96 * 12
        assert need.on_host(2, "cpu") == replace(need, kept=0).on_host(2, "cpu") + need.kept
        assert need.on_device(2) == replace(need, kept=0).on_device(2)
    # Two updates of rank 3: of an expert's layer, and of both halves of four experts.
    assert lane_need(apart, "cpu", 1 << 20).factors == 2 * 4 * 3 * (48 + 64)
    assert lane_need(fused, "cpu", 1 << 20).factors == 2 * 4 * 4 * 2 * 3 * (48 + 64)


@pytest.mark.parametrize(
    ("fused", "name", "row", "where"),
    [
        (False, EXPERT, 47, f"{EXPERT}, row 47"),
        (True, FUSED, 2 * 96 + 50, f"{FUSED}[192:288], row 50"),
        (True, FUSED, 0, f"{FUSED}[0:96], row 0"),
    ],
)
def test_a_wrong_value_of_an_expert_is_found(
    fused: bool, name: str, row: Any, where: str, moe: Bases, adapter: Path, out: Path
) -> None:
    merge(make_plan(moe(fused=fused), [adapter]), out, level="structure")
    assert found(out, "numeric") == []

    plant(out, name, row)

    wrong = [(c, w) for c, w in found(out, "numeric") if c not in ("digest", "files")]
    assert wrong == [("merged", f"model.safetensors: {where}")]


def test_a_wrong_value_of_an_expert_that_was_not_trained_is_found(
    moe: Bases, tmp_path: Path, out: Path
) -> None:
    """Between the rows of a fused tensor that are merged."""
    both = write_expert_adapter(tmp_path / "a", moe(), ["up_proj"], lora_alpha=6)
    edit_json(both / "adapter_config.json", target_modules=["experts.1.up_proj"])
    file = both / "adapter_model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if "experts.1.up" in k}, file)
    merge(make_plan(moe(fused=True), [both]), out, level="structure")
    assert found(out, "numeric") == []

    plant(out, FUSED, 96 + 10)

    wrong = [(c, w) for c, w in found(out, "numeric") if c not in ("digest", "files")]
    assert wrong == [("copied", f"model.safetensors: {FUSED}[0:144], row 106")]


@pytest.mark.parametrize("fused", [False, True])
def test_factors_that_lie_otherwise_are_not_called_right(
    fused: bool, moe: Bases, tmp_path: Path, out: Path
) -> None:
    """Square parameters, of which the version of PEFT alone tells how their factors lie."""
    base = moe(fused=fused, inner=64)
    adapter = write_fused_adapter(
        tmp_path / "a", moe(inner=64), swapped=False, peft_version="0.20.0"
    )
    merge(make_plan(base, [adapter]), out, level="numeric")
    other = shutil.copytree(adapter, tmp_path / "other")
    file = other / "adapter_model.safetensors"
    saved = load_file(file)
    for key in [k for k in saved if "experts.lora_A" in k]:
        twin = key.replace("lora_A", "lora_B")
        saved[key], saved[twin] = saved[twin].T.contiguous(), saved[key].T.contiguous()
    save_file(saved, file)

    assert found(out, "numeric", adapters=[(adapter, 1.0)]) == []
    assert len(found(out, "numeric", adapters=[(other, 1.0)])) == 2 * 4

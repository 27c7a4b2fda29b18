"""What an adapter's files say: scales, orientation, and which base tensors they fit."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from merged_by_hand import write_weights
from zero_adapters import BASE, UP, Q, write_adapter

from merge_core.stores.location import locate
from merge_core.verify.recipe import adapter_recipe
from merge_core.verify.updates import Delta


def deltas(path: Path, weight: float = 1.0, model_type: str = "qwen2") -> dict[str, Delta]:
    found, findings = adapter_recipe(locate(path), weight, BASE, model_type)
    assert findings == []
    return {name: update for name, (update,) in found.updates.items()}  # type: ignore[misc]


SCALES = {
    "plain": ({"r": 4, "lora_alpha": 10}, 1.0, 10 / 4, 10 / 4),
    "weighted": ({"r": 4, "lora_alpha": 10}, -0.5, -10 / 8, -10 / 8),
    "rank-stabilised": ({"r": 4, "lora_alpha": 10, "use_rslora": True}, 1.0, 5.0, 5.0),
    "rank by module": ({"r": 4, "lora_alpha": 8, "rank_pattern": {"up_proj": 2}}, 1.0, 2.0, 4.0),
    "rank by module, stabilised": (
        {"r": 4, "lora_alpha": 8, "rank_pattern": {"up_proj": 2}, "use_rslora": True},
        1.0,
        4.0,
        8 / math.sqrt(2),
    ),
    "alpha by module": (
        {"r": 4, "lora_alpha": 8, "alpha_pattern": {"layers.1.self_attn.q_proj": 2}},
        1.0,
        0.5,
        2.0,
    ),
    "the first pattern wins": (
        {"r": 4, "lora_alpha": 8, "alpha_pattern": {".*proj": 16, "q_proj": 2}},
        1.0,
        4.0,
        4.0,
    ),
    "a pattern is for the end, from a dot on": (
        {"r": 4, "lora_alpha": 8, "alpha_pattern": {"mlp": 2, "roj": 3, "1.mlp.up_proj": 20}},
        1.0,
        2.0,
        2.0,
    ),
    "a dot in a pattern is any character": (
        {"r": 4, "lora_alpha": 8, "alpha_pattern": {"11.mlp.up.proj": 20}},
        1.0,
        2.0,
        5.0,
    ),
    "a pattern for the whole path": (
        {"r": 4, "lora_alpha": 8, "alpha_pattern": {r"^model\.layers\.1\..*": 2}},
        1.0,
        0.5,
        2.0,
    ),
}


@pytest.mark.parametrize("story", SCALES)
def test_scales_follow_peft(story: str, tmp_path: Path) -> None:
    fields, weight, q_scale, up_scale = SCALES[story]
    ranks = {Q: 4, UP: fields.get("rank_pattern", {}).get("up_proj", 4)}

    found = deltas(write_adapter(tmp_path / "a", ranks, **fields), weight)

    assert {name: delta.scale for name, delta in found.items()} == {
        f"{Q}.weight": pytest.approx(q_scale, rel=1e-15),
        f"{UP}.weight": pytest.approx(up_scale, rel=1e-15),
    }
    assert found[f"{Q}.weight"].a == f"base_model.model.{Q}.lora_A.weight"
    assert found[f"{Q}.weight"].path == locate(tmp_path / "a" / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("model_type", "flag", "module", "shape", "transposed"),
    [
        ("qwen2", True, Q, (6, 6), False),  # always nn.Linear, whatever the flag says
        ("qwen2", True, UP, (10, 6), False),
        ("qwen2_moe", True, Q, (6, 6), False),
        ("gpt2", True, Q, (6, 6), True),
        ("gpt2", False, Q, (6, 6), True),  # always Conv1D
        ("llama", False, Q, (6, 6), False),
        ("gpt2", False, UP, (10, 6), False),
        ("gpt2", True, UP, (10, 6), False),  # the shapes leave no choice
        ("gpt2", False, UP, (6, 10), True),
    ],
)
def test_orientation(
    model_type: str,
    flag: bool,
    module: str,
    shape: tuple[int, int],
    transposed: bool,
    tmp_path: Path,
) -> None:
    path = write_adapter(
        tmp_path / "a", {module: 8}, {f"{module}.weight": shape}, fan_in_fan_out=flag
    )

    found = deltas(path, model_type=model_type)

    assert found[f"{module}.weight"].transposed == transposed


MISFITS: dict[str, tuple[dict[str, int], dict[str, tuple[int, int]], str]] = {
    "no such base tensor": (
        {"model.layers.7.nothing": 8},
        {"model.layers.7.nothing.weight": (6, 6)},
        "the base has no tensor 'model.layers.7.nothing.weight' to add it to",
    ),
    "another rank than the config's": (
        {Q: 4},
        {},
        "A is (4, 6), B is (6, 4); the config says rank 8",
    ),
    "another shape": (
        {UP: 8},
        {f"{UP}.weight": (9, 6)},
        "B @ A is [9, 6], the base tensor is [10, 6]",
    ),
    "transposed in a model of linear layers": (
        {UP: 8},
        {f"{UP}.weight": (6, 10)},
        "B @ A is [6, 10], the base tensor is [10, 6]",
    ),
    "a base tensor that is no matrix": (
        {"model.norm": 8},
        {"model.norm.weight": (6, 1)},
        "B @ A is [6, 1], the base tensor is [6]",
    ),
}


@pytest.mark.parametrize("story", MISFITS)
def test_factors_that_fit_nothing_are_findings(story: str, tmp_path: Path) -> None:
    ranks, shapes, what = MISFITS[story]
    path = write_adapter(tmp_path / "a", ranks, shapes)

    found, [finding] = adapter_recipe(locate(path), 1.0, BASE, "qwen2")

    assert found.updates == {}
    assert (finding.check, finding.where) == ("adapter", f"{path}: {next(iter(ranks))}")
    assert finding.what == what


def test_half_a_pair_is_a_finding(tmp_path: Path) -> None:
    path = write_adapter(tmp_path / "a", {})
    key = f"base_model.model.{Q}.lora_B.weight"
    write_weights(path / "adapter_model.safetensors", {key: torch.zeros(6, 8)})

    _, [finding] = adapter_recipe(locate(path), 1.0, BASE, "qwen2")

    assert finding.what == "A is None, B is (6, 8); the config says rank 8"


@pytest.mark.parametrize("init", [True, False, "gaussian", "eva", "mica", "orthogonal"])
def test_initialisations_that_leave_the_base_alone_are_fine(
    init: bool | str, tmp_path: Path
) -> None:
    assert len(deltas(write_adapter(tmp_path / "a", {Q: 8}, init_lora_weights=init))) == 1

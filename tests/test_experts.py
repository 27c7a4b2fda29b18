"""Adapters on the experts of a MoE model merge into checkpoints of either layout."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from models import (
    ALL_LINEAR,
    DTYPES,
    assert_same_tensors,
    deltas_of_adapter,
    make_adapter,
    oracle,
    read_tensors,
    run_adapter,
)
from moe import (
    BOTH,
    apart,
    expert_deltas,
    merged,
    write_expert_adapter,
    write_fused_adapter,
)
from oracles import Delta, assert_within_contract, merged_like_peft
from peft.utils import transformers_weight_conversion
from safetensors.torch import load_file, save_file

from merge_core.errors import InputError
from merge_core.planner import make_plan

Bases = Callable[..., Path]
LAYOUTS = {"a tensor for each expert": False, "fused": True}
EXPERT_LAYERS = ["gate_proj", "up_proj", "down_proj"]
ROUTER = ["gate", "shared_expert_gate"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_factors_of_each_expert_are_merged_to_the_same_bits(
    dtype: str, moe: Bases, tmp_path: Path, out: Path
) -> None:
    """As older transformers and PEFT since 0.8 had them: every expert's layers are modules."""
    base = moe(dtype)
    targets = ["q_proj", *EXPERT_LAYERS, *ROUTER]
    patterns = {"rank_pattern": {"experts.2.up_proj": 3}, "alpha_pattern": {"down_proj": 5}}
    adapter = write_expert_adapter(tmp_path / "a", base, targets, lora_alpha=6, **patterns)
    tensors = read_tensors(base)

    got = merged(base, adapter, out)

    assert_same_tensors(got, merged_like_peft(tensors, deltas_of_adapter(adapter)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_factors_of_each_expert_go_to_its_rows_of_a_fused_tensor(
    dtype: str, moe: Bases, tmp_path: Path, out: Path
) -> None:
    base = moe(dtype)
    adapter = write_expert_adapter(tmp_path / "a", base, [*EXPERT_LAYERS, *ROUTER], lora_alpha=6)

    got = merged(moe(dtype, fused=True), adapter, out)

    assert_within_contract(got, read_tensors(base), deltas_of_adapter(adapter))


PATTERNS = pytest.mark.filterwarnings(
    "ignore:The following (rank|alpha)_pattern keys did not match"
)
"""PEFT looks for them among modules alone when it warns."""

PARAMETERS: dict[str, dict[str, Any]] = {
    "both parameters": {"target_parameters": BOTH},
    "the outer parameter, pickled": {"target_parameters": ["down_proj"], "safe": False},
    "the inner parameter, in bfloat16": {
        "target_parameters": ["mlp.experts.gate_up_proj"],
        "dtype": torch.bfloat16,
    },
    "patterns, beside layers": {
        "target_parameters": [*BOTH, "gate.weight"],
        "target_modules": ["q_proj", "shared_expert_gate", "shared_expert.down_proj"],
        "rank_pattern": {r".*\.gate_up_proj": 6},
        "alpha_pattern": {r".*\.gate_up_proj": 9},
    },
}


@PATTERNS
@pytest.mark.parametrize("fused", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("story", PARAMETERS)
def test_parameters_are_rounded_once_where_peft_rounds_twice(
    story: str, fused: bool, moe: Bases, tmp_path: Path, out: Path
) -> None:
    fields = {"r": 4, "lora_alpha": 8, "target_modules": [], **PARAMETERS[story]}
    adapter = make_adapter(tmp_path / "a", moe(), scale=0.02, **fields)

    got = merged(moe(fused=fused), adapter, out)

    assert_within_contract(got, read_tensors(moe()), expert_deltas(adapter, moe()))


@PATTERNS
@pytest.mark.parametrize("fused", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("story", PARAMETERS)
def test_parameters_come_out_as_peft_merges_them_in_float32(
    story: str, fused: bool, moe: Bases, tmp_path: Path, out: Path
) -> None:
    """Where PEFT rounds nothing but its sums, which it adds up for all experts at once."""
    base = moe("F32", fused=fused)
    fields = {"r": 4, "lora_alpha": 8, "target_modules": [], **PARAMETERS[story]}
    adapter = make_adapter(tmp_path / "a", base, **fields)

    got, wanted = merged(base, adapter, out), apart(oracle(base, adapter))

    assert got.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.allclose(got[name], tensor, rtol=1e-6, atol=1e-7), name


@pytest.mark.parametrize("fused", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize(
    ("version", "inner", "swapped"),
    [
        (None, 48, True),
        ("0.18.1", 48, True),
        ("0.19.0", 48, False),
        ("0.18.1", 64, True),  # square: the version alone tells
        (None, 64, True),
        ("0.19.0", 64, False),
        ("0.21.2", 64, False),
        ("0.18.2.dev0@f2a9", 48, True),
    ],
)
def test_peft_swapped_the_factors_of_parameters_before_0_19(
    version: str | None,
    inner: int,
    swapped: bool,
    fused: bool,
    moe: Bases,
    tmp_path: Path,
    out: Path,
) -> None:
    base = moe(inner=inner)
    said = {} if version is None else {"peft_version": version}
    adapter = write_fused_adapter(tmp_path / "a", base, swapped=swapped, **said)

    got = merged(moe(inner=inner, fused=fused), adapter, out)

    assert_within_contract(got, read_tensors(base), expert_deltas(adapter, base, swapped=swapped))


def test_a_square_parameter_of_no_release_is_refused(moe: Bases, tmp_path: Path) -> None:
    base = moe(inner=64)
    said = {"swapped": True, "peft_version": "0.19.0.dev0"}
    adapter = write_fused_adapter(tmp_path / "a", base, **said)

    with pytest.raises(InputError, match=r"down_proj.*nothing tells which way the factors lie"):
        make_plan(base, [adapter])


@PATTERNS
def test_what_peft_converts_to_fused_parameters_is_merged_as_before(
    moe: Bases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PEFT 0.21 knows how, but does it for models named after Qwen2-MoE alone."""
    known = transformers_weight_conversion._MODEL_TO_CONVERSION_PATTERN
    monkeypatch.setitem(known, "qwen2_moe", "qwen2_moe")
    base = moe()
    targets = ["q_proj", "gate", *EXPERT_LAYERS]
    old = write_expert_adapter(tmp_path / "old", base, targets, lora_alpha=6)
    rewrite_without(old, "shared_expert|layers.1.mlp")  # PEFT drops them
    run_adapter(base, old).save_pretrained(tmp_path / "new")
    saved = load_file(tmp_path / "new" / "adapter_model.safetensors")
    inner = "base_model.model.model.layers.0.mlp.experts.base_layer.lora_B.weight"
    assert saved[inner].shape == (2 * 48, 2 * 4 * 4)

    got = merged(base, tmp_path / "new", tmp_path / "out")

    assert_within_contract(got, read_tensors(base), deltas_of_adapter(old))


def rewrite_without(adapter: Path, pattern: str) -> None:
    file = adapter / "adapter_model.safetensors"
    saved = load_file(file)
    save_file({k: v for k, v in saved.items() if not re.search(pattern, k)}, file)


def test_adapters_of_each_kind_are_summed_before_they_are_rounded(
    moe: Bases, tmp_path: Path, out: Path
) -> None:
    base, weights = moe(), [0.5, -1.5, 1.0]
    one = write_expert_adapter(tmp_path / "1", base, EXPERT_LAYERS, lora_alpha=6)
    two = write_fused_adapter(tmp_path / "2", base, swapped=False, peft_version="0.20.0")
    three = write_fused_adapter(tmp_path / "3", base, swapped=True)
    each = [
        deltas_of_adapter(one),
        expert_deltas(two, base),
        expert_deltas(three, base, swapped=True),
    ]
    summed: dict[str, list[Delta]] = {}
    for deltas, weight in zip(each, weights, strict=True):
        for name, (delta,) in deltas.items():
            scaled = replace(delta, scaling=delta.scaling * weight)
            summed.setdefault(name, []).append(scaled)

    for fused in LAYOUTS.values():
        named = [
            f"{path}@{weight}" for path, weight in zip([one, two, three], weights, strict=True)
        ]
        got = merged(moe(fused=fused), named, out / str(fused))

        assert_within_contract(got, read_tensors(base), summed)


@PATTERNS
def test_a_parameter_of_a_layer_is_taken_as_it_lies(
    bases: Bases, tmp_path: Path, out: Path
) -> None:
    base = bases("F32", shard="80KB")
    fields = {
        "target_modules": ["q_proj"],
        "target_parameters": ["o_proj.weight", "embed_tokens.weight"],
        "rank_pattern": {"o_proj.weight": 3, "o_proj": 5},
    }
    adapter = make_adapter(tmp_path / "a", base, **fields)

    got = merged(base, adapter, out)

    assert_same_tensors(got, oracle(base, adapter))


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_layers_that_are_modules_in_transformers_5_merge_to_the_same_bits(
    dtype: str, moe: Bases, tmp_path: Path, out: Path
) -> None:
    """The names of the targets are those of experts too, of which PEFT then trains none."""
    base, targets = moe(dtype), [*ALL_LINEAR, "shared_expert_gate"]
    adapter = make_adapter(tmp_path / "a", base, target_modules=targets)

    got = merged(base, adapter, out)

    assert_same_tensors(got, apart(oracle(base, adapter)))


def test_a_router_and_the_gate_of_the_shared_expert_are_taken_whole(
    moe: Bases, tmp_path: Path, out: Path
) -> None:
    fields = {"modules_to_save": ["mlp.gate", "shared_expert_gate"], "target_modules": ["q_proj"]}
    adapter = make_adapter(tmp_path / "a", moe(), **fields)

    got = merged(moe(), adapter, out)

    assert_same_tensors(got, apart(oracle(moe(), adapter)))

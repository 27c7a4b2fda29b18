"""Everything that a LoRA adapter can hold beside plain factors merges as PEFT merges it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import (
    DTYPES,
    assert_same_tensors,
    make_adapter,
    oracle,
    read_tensors,
)
from oracles import Delta, Tensors, assert_within_contract, steps_between
from peft import TrainableTokensConfig
from safetensors.torch import load_file

from merge_core.merge import merge
from merge_core.planner import make_plan
from merge_core.verify import verify

BIT_BY_BIT: dict[str, dict[str, Any]] = {
    "DoRA": {"use_dora": True},
    "DoRA, rank-stabilised, patterns": {
        "use_dora": True,
        "use_rslora": True,
        "rank_pattern": {"q_proj": 3},
        "alpha_pattern": {"mlp.*": 5},
    },
    "DoRA on an untied head": {"use_dora": True, "target_modules": ["lm_head", "o_proj"]},
    "a bias on B": {"lora_bias": True, "target_modules": ["q_proj", "v_proj"], "lora_alpha": 10},
    "every bias": {"bias": "all", "target_modules": ["q_proj", "up_proj"]},
    "the biases of trained layers": {"bias": "lora_only", "target_modules": ["q_proj", "v_proj"]},
    "a bias on B beside a trained bias": {
        "lora_bias": True,
        "bias": "lora_only",
        "target_modules": ["q_proj", "k_proj"],
    },
    "whole modules": {"modules_to_save": ["lm_head", "embed_tokens", "input_layernorm", "norm"]},
    "a whole module of several tensors": {
        "modules_to_save": ["self_attn"],
        "target_modules": ["up_proj"],
    },
    "trained tokens": {"trainable_token_indices": [1, 5, 77]},
    "trained tokens by module": {
        "trainable_token_indices": {"embed_tokens": [0, 159], "lm_head": [3]}
    },
    "LoRA on the head": {"target_modules": ["q_proj", "lm_head"]},
}


def check_like_peft(base: Path, adapter: Path, out: Path) -> None:
    merge(make_plan(base, [adapter], shard_bytes=70_000), out)

    assert_same_tensors(read_tensors(out), oracle(base, adapter))
    assert verify(out, "numeric").findings == ()


@pytest.mark.parametrize("feature", BIT_BY_BIT)
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_peft_rounds_once_is_merged_to_the_same_bits(
    dtype: str, feature: str, bases: Callable[..., Path], tmp_path: Path, out: Path
) -> None:
    base = bases(dtype, shard="80KB")
    adapter = make_adapter(tmp_path / "adapter", base, **BIT_BY_BIT[feature])

    check_like_peft(base, adapter, out)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_tuner_of_trained_tokens_merges_to_the_same_bits(
    dtype: str, bases: Callable[..., Path], tmp_path: Path, out: Path
) -> None:
    config = TrainableTokensConfig(token_indices=[2, 159], target_modules=["embed_tokens"])
    base = bases(dtype, shard="80KB")

    check_like_peft(base, make_adapter(tmp_path / "adapter", base, config=config), out)


def embedding_delta(adapter: Path, scaling: float) -> dict[str, list[Delta]]:
    saved = load_file(adapter / "adapter_model.safetensors")
    a, b = (saved[f"base_model.model.model.embed_tokens.lora_embedding_{x}"] for x in "AB")
    return {"model.embed_tokens.weight": [Delta(a=a, b=b, scaling=scaling, transposed=True)]}


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_embedding_is_rounded_once_where_peft_rounds_twice(
    dtype: str, bases: Callable[..., Path], tmp_path: Path, out: Path
) -> None:
    base = bases(dtype, shard="80KB")
    fields = {"target_modules": ["embed_tokens"], "r": 6, "lora_alpha": 10}
    adapter = make_adapter(tmp_path / "adapter", base, scale=0.02, **fields)

    merge(make_plan(base, [adapter]), out)

    assert verify(out, "numeric").findings == ()
    deltas = embedding_delta(adapter, 10 / 6)
    assert_within_contract(read_tensors(out), read_tensors(base), deltas)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dora_on_an_embedding_takes_the_norm_of_each_column(
    dtype: str, bases: Callable[..., Path], tmp_path: Path, out: Path
) -> None:
    """PEFT rounds delta and norms to the dtype of the base."""
    base = bases(dtype, shard="80KB")
    fields = {"target_modules": ["embed_tokens"], "use_dora": True, "lora_alpha": 10}
    adapter = make_adapter(tmp_path / "adapter", base, **fields)

    merge(make_plan(base, [adapter]), out)

    assert verify(out, "numeric").findings == ()
    (name,), tensors = embedding_delta(adapter, 10 / 8), read_tensors(base)
    saved = load_file(adapter / "adapter_model.safetensors")
    magnitude = saved["base_model.model.model.embed_tokens.lora_magnitude_vector"].double()
    (delta,) = embedding_delta(adapter, 10 / 8)[name]
    changed = tensors[name].double() + delta.product(torch.float64)
    exact = {**tensors, name: magnitude / changed.norm(dim=0) * changed}
    check_rounded_once(read_tensors(out), exact)


def check_rounded_once(got: Tensors, exact: Tensors) -> None:
    """At most one value in a thousand is off, by one step: float32 noise at a border. Where base
    and delta cancel, what is left has smaller steps than the noise of both.
    """
    wanted = {name: t.to(got[name].dtype) for name, t in exact.items()}
    assert got.keys() == wanted.keys()
    for name, tensor in wanted.items():
        if tensor.dtype == torch.float32:
            assert torch.allclose(got[name], tensor, rtol=1e-5, atol=1e-8), name
            continue
        steps, off = steps_between(got[name], tensor), (got[name].double() - exact[name]).abs()
        assert ((steps <= 1) | (off <= exact[name].double().abs().max() * 2.0**-20)).all(), name
        assert (steps > 0).sum() <= 1 + steps.numel() / 1000, name


@pytest.mark.parametrize("feature", ["velora_config", "monteclora_config"])
def test_what_only_steered_the_training_changes_no_merge(
    feature: str, base: Path, tmp_path: Path, out: Path
) -> None:
    adapter = make_adapter(tmp_path / "adapter", base, **{feature: {}}, target_modules=["q_proj"])
    saved = load_file(adapter / "adapter_model.safetensors")
    assert any(feature.partition("_")[0] in key for key in saved)

    check_like_peft(base, adapter, out)

"""Matrices of many blocks and cells, whose borders lie inside rows: same bytes, and right ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from handmade import published
from models import assert_same_tensors, make_adapter, make_gpt2, oracle, read_tensors
from oracles import Tensors
from safetensors.torch import load_file
from test_grammar import check_rounded_once

from merge_core.memory import LaneChoice
from merge_core.merge import merge
from merge_core.planner import make_plan

SIZES = {"hidden_size": 516, "intermediate_size": 9003, "num_hidden_layers": 1}
ROW = 516
CELL = 4_194_304 // ROW
"""The row of a 16-bit embedding that a cell of 8 MiB cuts through, and one of every MiB."""


def merge_in_every_way(base: Path, adapter: Path, tmp_path: Path) -> Tensors:
    """The result, which is the same for one lane of large reads and four of small ones."""
    plan = make_plan(base, [adapter])
    outs = []
    for lanes, mebibytes in ((1, 8), (4, 1)):
        choice = LaneChoice(lanes=lanes, read_bytes=mebibytes << 20, reason="the test says so")
        outs.append(tmp_path / f"{lanes}-{mebibytes}")
        merge(plan, outs[-1], choice=choice, level="numeric")
    assert published(outs[0]) == published(outs[1])
    return read_tensors(outs[0])


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_dora_on_large_matrices_is_peft_s_own(
    dtype: str, bases: Callable[..., Path], tmp_path: Path
) -> None:
    base = bases(dtype, **SIZES, num_attention_heads=6, vocab_size=50)
    fields = {"target_modules": ["up_proj", "down_proj"], "r": 7, "lora_alpha": 10}
    adapter = make_adapter(tmp_path / "adapter", base, use_dora=True, **fields)

    assert_same_tensors(merge_in_every_way(base, adapter, tmp_path), oracle(base, adapter))


def large_vocabulary(bases: Callable[..., Path], dtype: str) -> Path:
    sizes = {**SIZES, "intermediate_size": 64}
    return bases(dtype, **sizes, num_attention_heads=6, vocab_size=9003)


def test_trained_tokens_on_both_sides_of_every_border_are_peft_s_own(
    bases: Callable[..., Path], tmp_path: Path
) -> None:
    base = large_vocabulary(bases, "BF16")
    rows = sorted({CELL // 8 * n + k for n in range(9) for k in (-1, 0, 1)} - {-1})
    fields: dict[str, Any] = {
        "target_modules": ["q_proj"],
        "trainable_token_indices": [*rows, 9002],
    }
    adapter = make_adapter(tmp_path / "adapter", base, **fields)

    assert_same_tensors(merge_in_every_way(base, adapter, tmp_path), oracle(base, adapter))


def test_embeddings_of_many_cells_are_rounded_once(
    bases: Callable[..., Path], tmp_path: Path
) -> None:
    base = large_vocabulary(bases, "BF16")
    fields = {"target_modules": ["embed_tokens"], "use_dora": True, "lora_alpha": 10}
    adapter = make_adapter(tmp_path / "adapter", base, **fields)
    prefix = "base_model.model.model.embed_tokens.lora_"
    a, b, m = factors(adapter, prefix, "embedding_A", "embedding_B", "magnitude_vector")
    tensors = read_tensors(base)
    changed = tensors["model.embed_tokens.weight"].double() + (b @ a).T * (10 / 8)

    exact = {**tensors, "model.embed_tokens.weight": m / changed.norm(dim=0) * changed}
    check_rounded_once(merge_in_every_way(base, adapter, tmp_path), exact)


def test_dora_on_transposed_layers_takes_the_norm_of_each_column(tmp_path: Path) -> None:
    """In float64, where PEFT sums them up in float32."""
    base = make_gpt2(tmp_path / "base", torch.bfloat16, width=720)
    modules = ["c_attn", "c_proj", "c_fc"]
    fields = {"use_dora": True, "fan_in_fan_out": True, "r": 5, "target_modules": modules}
    adapter = make_adapter(tmp_path / "adapter", base, **fields)
    exact = read_tensors(base)
    for name in [n for n in exact if n.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))]:
        prefix = f"base_model.model.{name.removesuffix('weight')}lora_"
        a, b, m = factors(adapter, prefix, "A.weight", "B.weight", "magnitude_vector")
        changed = exact[name].double() + (b @ a).T * (16 / 5)
        exact[name] = m / changed.norm(dim=0) * changed

    got = merge_in_every_way(base, adapter, tmp_path)

    check_rounded_once(got, exact)
    peft = oracle(base, adapter)
    assert all(torch.allclose(got[n].float(), peft[n].float(), rtol=1e-2, atol=1e-4) for n in got)


def factors(adapter: Path, prefix: str, *names: str) -> list[torch.Tensor]:
    saved = load_file(adapter / "adapter_model.safetensors")
    return [saved[f"{prefix}{name}"].double() for name in names]

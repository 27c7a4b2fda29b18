"""Any adapters on experts merge into any MoE checkpoint, expert by expert.

Written by hand, as in ``test_any_grammar``; that PEFT means the same is shown in ``test_experts``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from handmade import random_factors, write_adapter, write_base
from hypothesis import given, settings
from hypothesis import strategies as st
from models import DTYPES, read_tensors
from moe import LAYERS_OF, PREFIX, apart
from oracles import Tensors
from safetensors.torch import save_file
from test_grammar import check_rounded_once

from merge_core.architecture import expected_tensors
from merge_core.memory import LaneChoice
from merge_core.merge import merge
from merge_core.planner import make_plan

Factors = dict[str, tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """An adapter, how often it counts, and its deltas for a tensor for each expert."""

    factors: Factors = field(repr=False)
    config: dict[str, Any]
    weight: float
    deltas: Tensors = field(repr=False)
    """In float64."""


@st.composite
def models(draw: st.DrawFn) -> dict[str, Any]:
    """config.json of a MoE model."""
    layers = draw(st.integers(1, 3))
    return {
        "model_type": "qwen2_moe",
        "hidden_size": draw(st.sampled_from([8, 16, 72])),
        "intermediate_size": 20,
        "num_attention_heads": 2,
        "num_hidden_layers": layers,
        "vocab_size": 11,
        "num_experts": draw(st.integers(2, 5)),
        "moe_intermediate_size": draw(st.sampled_from([3, 16, 72, 90])),
        "shared_expert_intermediate_size": 5,
        "decoder_sparse_step": draw(st.sampled_from([1, 2])) if layers > 1 else 1,
        "mlp_only_layers": draw(st.sampled_from([[], [0]])) if layers > 2 else [],
    }


@st.composite
def adapters(draw: st.DrawFn, config: dict[str, Any]) -> Drawn:
    shapes: dict[str, Any] = dict(expected_tensors(config, fused=True))
    parameters = [name for name in shapes if ".experts." in name]
    named = draw(st.lists(st.sampled_from(list(LAYERS_OF)), min_size=1, unique=True))
    rank, alpha, seed = draw(st.integers(1, 4)), draw(st.integers(1, 9)), draw(st.integers(0, 99))
    kind = draw(st.sampled_from(["layers", "0.18.0", "0.19.1"]))
    fields: dict[str, Any] = {"r": rank, "lora_alpha": alpha}
    ranks = dict.fromkeys(LAYERS_OF, rank)
    if kind == "layers":
        targets = [layer for name in named for layer in LAYERS_OF[name]]
        fields["target_modules"] = rf".*\.experts\.\d+\.({'|'.join(targets)})"
    else:
        fields |= {"target_parameters": [f"experts.{name}" for name in named]}
        fields |= {"peft_version": kind}
        pattern = draw(st.sampled_from([{}, {"gate_up_proj": 5}]))
        fields["rank_pattern"] = pattern
        ranks |= pattern
    factors: Factors = {}
    deltas: Tensors = {}
    for parameter in parameters:
        module, _, name = parameter.rpartition(".")
        if name not in named:
            continue
        seed += 1
        experts, out, width = shapes[parameter]
        half = out // len(LAYERS_OF[name])
        r = ranks[name]
        if kind == "layers":
            each = {
                f"{module}.{n}.{layer}": (half, width)
                for n in range(experts)
                for layer in LAYERS_OF[name]
            }
            mine = random_factors(each, dict.fromkeys(each, r), seed=seed)
            factors |= mine
            for layer, (a, b) in mine.items():
                deltas[f"{layer}.weight"] = b.double() @ a.double() * (alpha / r)
            continue
        swapped = kind == "0.18.0"
        size = (width, out) if swapped else (out, width)
        wrapper = f"{module}.base_layer" if name == "gate_up_proj" and len(named) > 1 else module
        ((a, b),) = random_factors({wrapper: size}, {wrapper: r * experts}, seed=seed).values()
        factors[wrapper] = (a, b)
        whole = torch.einsum(
            "o r e, e r i -> e o i",
            b.double().reshape(size[0], r, experts),
            a.double().reshape(experts, r, size[1]),
        )
        for n, delta in enumerate(whole.transpose(1, 2) if swapped else whole):
            for layer, rows in zip(LAYERS_OF[name], delta.split(half), strict=True):
                deltas[f"{module}.{n}.{layer}.weight"] = rows * (alpha / r)
    weight = draw(st.sampled_from([1.0, 0.5, -1.25]))
    return Drawn(factors=factors, config=fields, weight=weight, deltas=deltas)


def write_whole_experts(path: Path, config: dict[str, Any], dtype: torch.dtype) -> Tensors:
    """An adapter that brings all experts; their weights, expert by expert."""
    generator = torch.Generator().manual_seed(8)
    whole = {
        name: torch.randn(shape, generator=generator).mul_(0.02).to(dtype)
        for name, shape in expected_tensors(config, fused=True)
        if ".experts." in name
    }
    write_adapter(path, {}, modules_to_save=["experts"])
    saved = {f"{PREFIX}{name}": tensor for name, tensor in whole.items()}
    save_file(saved, path / "adapter_model.safetensors")
    return apart(whole)


@settings(max_examples=30)
@given(data=st.data())
def test_any_adapters_on_experts_merge_into_any_checkpoint(
    data: st.DataObject, folders: Any
) -> None:
    path: Path = next(folders)
    config = data.draw(models())
    fused, dtype = data.draw(st.booleans()), DTYPES[data.draw(st.sampled_from(list(DTYPES)))]
    generator = torch.Generator().manual_seed(7)
    tensors: Tensors = {
        name: torch.randn(shape, generator=generator).mul_(0.02).to(dtype)
        for name, shape in expected_tensors(config, fused=fused)
    }
    base = write_base(path / "base", tensors, config, files=data.draw(st.integers(1, 3)))
    drawn = data.draw(st.lists(adapters(config), min_size=1, max_size=2))
    named: list[str] = []
    exact = {name: tensor.double() for name, tensor in apart(tensors).items()}
    if data.draw(st.booleans(), label="experts brought whole"):
        theirs = DTYPES[data.draw(st.sampled_from(list(DTYPES)))]
        whole = write_whole_experts(path / "whole", config, theirs)
        exact |= {name: tensor.double() for name, tensor in whole.items()}
        named.append(str(path / "whole"))
    for number, one in enumerate(drawn):
        at = write_adapter(path / str(number), one.factors, **one.config)
        named.append(f"{at}@{one.weight}")
        for name, delta in one.deltas.items():
            exact[name] = exact[name] + delta * one.weight
    choice = LaneChoice(lanes=data.draw(st.integers(1, 3)), read_bytes=1 << 20, reason="drawn")

    plan = make_plan(base, named, shard_bytes=data.draw(st.sampled_from([30_000, 1 << 20])))
    merge(plan, path / "out", choice=choice, level="numeric")

    check_rounded_once(apart(read_tensors(path / "out")), exact)

"""BD-LoRA, whose A or B is block-diagonal, merges as PEFT merges it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from handmade import random_factors, write_adapter
from models import (
    assert_same_tensors,
    edit_json,
    make_adapter,
    oracle,
    read_tensors,
)
from oracles import Delta, assert_within_contract
from peft import BdLoraConfig
from safetensors.torch import load_file

from merge_core.errors import InputError
from merge_core.merge import merge
from merge_core.planner import make_plan

KINDS: dict[str, dict[str, Any]] = {
    "every layer": {
        "use_bdlora": BdLoraConfig(
            target_modules_bd_a=["o_proj", "down_proj"],
            target_modules_bd_b=["q_proj", "k_proj", "v_proj", "up_proj", "gate_proj"],
            nblocks=4,
        ),
    },
    "some layers, rank-stabilised": {
        "use_bdlora": BdLoraConfig(
            target_modules_bd_a=["layers.1.mlp"], nblocks=2, match_strict=False
        ),
        "use_rslora": True,
        "rank_pattern": {"down_proj": 6},
    },
}


def deltas_of(adapter: Path, blocks: Callable[[str], tuple[int, int]], scaling: Any) -> Any:
    """With each stored factor on the diagonal, block by block."""
    saved, deltas = load_file(adapter / "adapter_model.safetensors"), {}
    for key in saved:
        if "lora_A" in key:
            module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            a, b = (
                torch.block_diag(*saved[key.replace("lora_A", side)].chunk(n))
                for side, n in zip(("lora_A", "lora_B"), blocks(module), strict=True)
            )
            deltas[f"{module}.weight"] = [Delta(a=a, b=b, scaling=scaling(len(a)))]
    return deltas


def blocks_of(kind: str) -> Callable[[str], tuple[int, int]]:
    def every_layer(module: str) -> tuple[int, int]:
        return (4, 1) if module.endswith(("o_proj", "down_proj")) else (1, 4)

    def some_layers(module: str) -> tuple[int, int]:
        return (2, 1) if "layers.1.mlp" in module else (1, 1)

    return every_layer if kind == "every layer" else some_layers


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_it_is_rounded_once_where_peft_rounds_twice(
    dtype: str, kind: str, bases: Callable[..., Path], tmp_path: Path, out: Path
) -> None:
    base = bases(dtype, shard="80KB")
    adapter = make_adapter(tmp_path / "a", base, scale=0.02, **KINDS[kind])

    merge(make_plan(base, [adapter], shard_bytes=70_000), out, level="numeric")

    rslora = KINDS[kind].get("use_rslora")
    deltas = deltas_of(adapter, blocks_of(kind), lambda r: 16 / (r**0.5 if rslora else r))
    assert_within_contract(read_tensors(out), read_tensors(base), deltas)


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_merged_to_the_same_bits_in_float32(
    kind: str, bases: Callable[..., Path], tmp_path: Path, out: Path
) -> None:
    base = bases("F32", shard="80KB")
    adapter = make_adapter(tmp_path / "a", base, **KINDS[kind])

    merge(make_plan(base, [adapter], shard_bytes=70_000), out, level="numeric")

    assert_same_tensors(read_tensors(out), oracle(base, adapter))


PROBLEMS: dict[str, tuple[dict[str, Any], str]] = {
    "both factors": ({"target_modules_bd_a": ["q_proj"]}, "names both of its factors"),
    "neither factor": ({"target_modules_bd_b": ["k_proj"]}, "names neither of its factors"),
    "other blocks": ({"nblocks": 2}, "lora_B 2, the config says 4"),
    "blocks that do not fit": ({"nblocks": 3}, "in 3 blocks"),
    "no blocks": ({"nblocks": 0}, "not a BdLoraConfig"),
    "a field of a later PEFT": ({"taper": 2}, "not a BdLoraConfig"),
    "no list": ({"target_modules_bd_a": "q_proj"}, "not a BdLoraConfig"),
}


@pytest.mark.parametrize("story", PROBLEMS)
def test_a_config_that_does_not_fit_is_refused(story: str, base: Path, tmp_path: Path) -> None:
    changes, said = PROBLEMS[story]
    module = "model.layers.0.self_attn.q_proj"
    a, b = random_factors({module: (64, 64)}, {module: 4})[module]
    fields = {"target_modules_bd_b": ["q_proj"], "nblocks": 4}
    adapter = write_adapter(tmp_path / "a", {module: (a, b[:, :1].contiguous())}, r=4, lora_alpha=8)
    edit_json(adapter / "adapter_config.json", use_bdlora=fields)
    make_plan(base, [adapter])

    edit_json(adapter / "adapter_config.json", use_bdlora={**fields, **changes})

    with pytest.raises(InputError, match=said):
        make_plan(base, [adapter])


def test_dora_of_block_diagonal_factors_is_refused(base: Path, tmp_path: Path) -> None:
    module = "model.layers.0.self_attn.q_proj"
    factors = random_factors({module: (64, 64)}, {module: 4})
    fields = {"use_bdlora": {"nblocks": 1}, "use_dora": True}
    adapter = write_adapter(tmp_path / "a", factors, r=4, **fields)

    with pytest.raises(InputError, match="of which PEFT trains one at a time"):
        make_plan(base, [adapter])

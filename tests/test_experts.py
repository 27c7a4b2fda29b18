"""Adapters on the experts of a MoE model merge into checkpoints of either layout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import (
    DTYPES,
    assert_same_tensors,
    deltas_of_adapter,
    make_adapter,
    oracle,
    read_tensors,
)
from moe import (
    BOTH,
    apart,
    expert_deltas,
    make_moe,
    merged,
    write_expert_adapter,
)
from oracles import assert_within_contract, merged_like_peft

Bases = Callable[..., Path]
LAYOUTS = {"a tensor for each expert": False, "fused": True}
EXPERT_LAYERS = ["gate_proj", "up_proj", "down_proj"]
ROUTER = ["gate", "shared_expert_gate"]


@pytest.fixture(scope="session")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Bases:
    """Makes MoE checkpoints, each kind once: ``moe("F32", fused=True)``."""
    made: dict[str, Path] = {}

    def make(dtype: str = "BF16", **options: Any) -> Path:
        key = repr((dtype, sorted(options.items())))
        if key not in made:
            path = tmp_path_factory.mktemp("moe") / "base"
            made[key] = make_moe(path, dtype=DTYPES[dtype], **options)
        return made[key]

    return make


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
    "the outer parameter": {"target_parameters": ["down_proj"]},
    "the inner parameter": {"target_parameters": ["mlp.experts.gate_up_proj"]},
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

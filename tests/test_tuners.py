"""Other tuners than LoRA give what PEFT makes of a float32 copy of the base, rounded once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from models import DTYPES, assert_same_tensors, read_tensors
from tuners import ALL, CONFIGS, merged_by_peft

from merge_core.merge import merge
from merge_core.planner import make_plan

ROUNDS_ONCE = {
    "ADALORA",
    "BEFT",
    "BOFT",
    "FOURIERFT",
    "GRALORA",
    "HRA",
    "IA3",
    "LN_TUNING",
    "LOHA",
    "LOKR",
    "MISS",
    "OFT",
    "PVERA",
    "SHIRA",
    "TINYLORA",
    "VBLORA",
    "VERA",
    "WAVEFT",
}
"""Where PEFT, in the dtype of a 16-bit base, comes to the same bits."""


@pytest.mark.parametrize("name", ALL)
def test_the_result_is_that_of_peft_on_a_float32_copy_rounded_once(
    name: str, bases: Callable[..., Path], tuned: Callable[..., Path], tmp_path: Path
) -> None:
    base, adapter = bases("BF16", shard="80KB"), tuned(name)

    merge(make_plan(base, [adapter], shard_bytes=70_000), tmp_path / "out")

    wanted = {n: tensor.bfloat16() for n, tensor in merged_by_peft(base, adapter).items()}
    assert_same_tensors(read_tensors(tmp_path / "out"), wanted)
    assert any(not torch.equal(wanted[n], tensor) for n, tensor in read_tensors(base).items())
    if name in CONFIGS:
        in_16_bits = merged_by_peft(base, adapter, float32=False)
        same = all(torch.equal(wanted[n], tensor) for n, tensor in in_16_bits.items())
        assert same == (name in ROUNDS_ONCE)


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, "F32") for name in CONFIGS), ("IA3", "F16"), ("LN_TUNING", "F16")]
)
def test_the_result_on_a_base_in_another_dtype_is_that_of_peft(
    name: str, dtype: str, bases: Callable[..., Path], tuned: Callable[..., Path], tmp_path: Path
) -> None:
    base, adapter = bases(dtype, shard="80KB"), tuned(name, dtype)

    merge(make_plan(base, [adapter], shard_bytes=70_000), tmp_path / "out")

    wanted = {n: t.to(DTYPES[dtype]) for n, t in merged_by_peft(base, adapter).items()}
    assert_same_tensors(read_tensors(tmp_path / "out"), wanted)

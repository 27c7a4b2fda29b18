"""--simulate-nf4 merges into what QLoRA trained on: the base through NF4 and back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import bitsandbytes.functional as bnb
import numpy as np
import pytest
import torch
from handmade import TWO_LANES, Geometry, random_tensors, write_base
from hypothesis import given, settings
from hypothesis import strategies as st
from models import (
    DTYPES,
    assert_same_tensors,
    deltas_of_adapter,
    edit_json,
    make_adapter,
    oracle,
    read_tensors,
)
from oracles import Tensors, assert_within_contract, steps_between
from packers import Gptq, write_quantised

from merge_core.decoding.nf4 import Nf4Rounding
from merge_core.decoding.stored import Stored
from merge_core.errors import InputError
from merge_core.layout import TensorSpec
from merge_core.merge import merge
from merge_core.planner import make_plan
from merge_core.verify import verify

GEOMETRY = Geometry(hidden=64, inner=128)


def rounded(weight: torch.Tensor, top: int = 0, bottom: int | None = None) -> torch.Tensor:
    """Rows of a weight, rounded."""
    dtype = next(name for name, kind in DTYPES.items() if kind == weight.dtype)
    shape = (weight.shape[0], weight.shape[1])
    tensor = TensorSpec(name="w", dtype=dtype, shape=shape, offset=0, nbytes=weight.nbytes)
    loaded = Nf4Rounding(weight=Stored(file=0, tensor=tensor)).load(lambda _: weight)
    return loaded.rows(top, len(weight) if bottom is None else bottom)


def by_hand(weight: torch.Tensor) -> torch.Tensor:
    """bitsandbytes' own codes; the absmax of 8 bits from the definition, in float64."""
    packed, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    codes = torch.stack([packed.view(-1) >> 4, packed.view(-1) & 15], 1).view(-1).long()
    absmax = state.absmax.double().numpy()
    mean = absmax.mean().astype(np.float32)
    values = bnb.create_dynamic_map().double().numpy()
    found = []
    for first in range(0, len(absmax), 256):
        rest = absmax[first : first + 256] - mean
        outer = np.abs(rest).max()
        nearest = np.abs(rest[:, None] / outer - values).argmin(axis=1)
        found.append(values[nearest] * outer + mean)
    scales = torch.from_numpy(np.concatenate(found)).float().repeat_interleave(64)
    return (state.code[codes] * scales).to(weight.dtype).view(weight.shape)


def random_weight(shape: tuple[int, int], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).mul_(0.02).to(dtype)


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_it_is_what_bitsandbytes_makes_of_the_weight(dtype: str) -> None:
    weight = random_weight((300, 960), DTYPES[dtype])
    weight[7] = 0

    steps = steps_between(rounded(weight), by_hand(weight))
    assert int(steps.max()) <= 1
    assert float((steps > 0).double().mean()) < 1e-4  # a middle, or the table's last bit
    packed, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    same = rounded(weight) == bnb.dequantize_4bit(packed, state)
    assert float(same.double().mean()) > 0.99  # its kernel for CPUs misses some of the nearest


@settings(max_examples=50)
@given(
    rows=st.integers(1, 40),
    width=st.sampled_from([16, 48, 64, 80, 192]),
    data=st.data(),
    seed=st.integers(0, 1000),
)
def test_rows_are_those_of_the_whole(rows: int, width: int, data: st.DataObject, seed: int) -> None:
    weight = random_weight((4 * rows, width), torch.bfloat16, seed)
    top = data.draw(st.integers(0, 4 * rows - 1))
    bottom = data.draw(st.integers(top + 1, 4 * rows))

    assert torch.equal(rounded(weight, top, bottom), rounded(weight)[top:bottom])


@pytest.fixture(scope="module")
def plain(bases: Callable[..., Path]) -> Path:
    return bases("BF16", intermediate_size=128, shard="80KB")


def simulated(base: Path) -> Tensors:
    return {
        name: rounded(tensor) if "_proj.weight" in name else tensor
        for name, tensor in read_tensors(base).items()
    }


@pytest.mark.parametrize("dtype", [None, "float16"])
def test_deltas_are_added_to_the_rounded_base(
    dtype: str | None, plain: Path, tmp_path: Path, out: Path
) -> None:
    adapter = make_adapter(tmp_path / "adapter", plain, target_modules=["q_proj", "up_proj"])
    plan = make_plan(plain, [adapter], simulate_nf4=True, shard_bytes=60_000, dtype=dtype)
    merge(plan, out, choice=TWO_LANES)

    wanted = torch.float16 if dtype else torch.bfloat16
    deltas = deltas_of_adapter(adapter)
    assert_within_contract(read_tensors(out), simulated(plain), deltas, wanted)
    assert verify(out, "numeric").findings == ()
    edit_json(out / ".raymeld" / "plan.json", simulate_nf4=False)
    found = [finding.check for finding in verify(out, "numeric").findings]
    assert (found.count("ledger"), len(found)) == (10, 24)  # all values; decoded is not copied
    assert plan.notes == (
        "14 weights of the base rounded to NF4, blocks of 64, double quantisation",
    )


def test_the_result_is_peft_s_on_the_rounded_model_to_the_bit(
    plain: Path, tmp_path: Path, out: Path
) -> None:
    adapter = make_adapter(tmp_path / "adapter", plain)
    config = json.loads((plain / "config.json").read_text())
    other = write_base(tmp_path / "rounded", simulated(plain), config)

    plan = make_plan(plain, [adapter], simulate_nf4=True)
    merge(plan, out, choice=TWO_LANES)

    assert_same_tensors(read_tensors(out), oracle(other, adapter))
    assert (out / "config.json").read_bytes() == (plain / "config.json").read_bytes()


def test_it_is_part_of_the_fingerprint(plain: Path, tmp_path: Path, out: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", plain)
    merge(make_plan(plain, [adapter]), out, choice=TWO_LANES)

    with pytest.raises(InputError, match="OUT holds a finished merge of plan"):
        merge(make_plan(plain, [adapter], simulate_nf4=True), out, choice=TWO_LANES)


def test_what_it_cannot_mean_is_refused(plain: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", plain)
    quantised = write_quantised(tmp_path / "quantised", Gptq(), GEOMETRY).path
    other = write_base(tmp_path / "other", random_tensors(GEOMETRY), {"model_type": "gpt2"})
    for base, options, said in (
        (quantised, {}, "its own values are what the training saw. Give --dequantize"),
        (plain, {"dequantize": True}, "one of the two. Leave --simulate-nf4 out"),
        (quantised, {"dequantize": True}, "one of the two. Leave --simulate-nf4 out"),
        (other, {}, "which layers of 'gpt2' are rounded is not known"),
    ):
        with pytest.raises(InputError) as caught:
            make_plan(base, [adapter], simulate_nf4=True, **options)
        assert said in str(caught.value)

"""Packed weights decode to the values that their formats define, whatever rows are asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from decoded_rows import decoded_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from packers import Awq, AwqGemv, Fp8, Gptq, Packed
from safetensors.torch import save_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from merge_core.decoding.awq import AwqFormat
from merge_core.decoding.fp8 import Fp8Format, LoadedFp8
from merge_core.decoding.gptq import GptqFormat
from merge_core.stores.location import locate
from merge_core.verify.packed import unpacked
from merge_core.verify.unpacking import Unpacked
from merge_core.verify.weights import open_base

FLOATS = st.sampled_from([torch.float16, torch.bfloat16, torch.float32])
SEEDS = st.integers(0, 2**32 - 1)


def check(form: Any, packed: Packed, data: st.DataObject) -> None:
    out = len(packed.weight)
    top = data.draw(st.integers(0, out - 1), label="top")
    bottom = data.draw(st.integers(top + 1, out), label="bottom")
    got = decoded_rows(form.decoding, packed.parts, top, bottom)
    assert torch.equal(got, packed.weight[top:bottom])


@settings(max_examples=150)
@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    group=st.sampled_from([8, 16, 24, 32, 64, -1]),
    second=st.booleans(),
    order=st.sampled_from(["shuffled", "in order", "no index"]),
    scales=FLOATS,
    size=st.tuples(st.integers(1, 3), st.integers(1, 4)),
    seed=SEEDS,
    data=st.data(),
)
def test_gptq(
    bits: int,
    group: int,
    second: bool,
    order: str,
    scales: torch.dtype,
    size: tuple[int, int],
    seed: int,
    data: st.DataObject,
) -> None:
    how = Gptq(
        bits=bits,
        group=group,
        second=second,
        shuffled=order == "shuffled",
        without_index=order == "no index",
        scales=scales,
    )

    check(GptqFormat.of(how.config, "here"), how.pack(32 * size[0], 32 * size[1], seed), data)


@settings(max_examples=60)
@given(
    group=st.sampled_from([8, 16, -1]),
    scales=FLOATS,
    size=st.tuples(st.integers(1, 6), st.integers(1, 5)),
    seed=SEEDS,
    data=st.data(),
)
def test_awq(
    group: int, scales: torch.dtype, size: tuple[int, int], seed: int, data: st.DataObject
) -> None:
    how = Awq(group=group, scales=scales)

    check(AwqFormat.of(how.config, "here"), how.pack(8 * size[0], 16 * size[1], seed), data)


@settings(max_examples=60)
@given(
    fast=st.booleans(),
    group=st.sampled_from([32, 64, 128, 192]),
    scales=st.sampled_from([torch.float16, torch.bfloat16]),
    size=st.tuples(st.integers(1, 4), st.integers(1, 3)),
    seed=SEEDS,
    data=st.data(),
)
def test_awq_for_its_gemv_kernels(
    fast: bool,
    group: int,
    scales: torch.dtype,
    size: tuple[int, int],
    seed: int,
    data: st.DataObject,
) -> None:
    how = AwqGemv(group=group, fast=fast, scales=scales)
    width = size[1] * max(group, 64)

    check(AwqFormat.of(how.config, "here"), how.pack(8 * size[0], width, seed), data)


@settings(max_examples=60)
@given(
    block=st.none() | st.tuples(st.integers(1, 40), st.integers(1, 40)),
    scales=FLOATS,
    size=st.tuples(st.integers(1, 50), st.integers(1, 50)),
    seed=SEEDS,
    data=st.data(),
)
def test_fp8(
    block: tuple[int, int] | None,
    scales: torch.dtype,
    size: tuple[int, int],
    seed: int,
    data: st.DataObject,
) -> None:
    how = Fp8(block=block, scales=scales)

    check(Fp8Format.of(how.config, "here"), how.pack(*size, seed), data)


def test_a_scale_of_fp8_is_spread_over_the_rows_alone_that_are_asked_for() -> None:
    weight = torch.ones(4, 8).to(torch.float8_e4m3fn)
    scale = torch.tensor([[3.0]])

    rows = LoadedFp8(weight=weight, scale=scale, block=(1 << 40, 1 << 40)).rows(1, 3)

    assert torch.equal(rows, torch.full((2, 8), 3.0))


@pytest.mark.parametrize("scales", [torch.bfloat16, torch.float32])
def test_fp8_is_what_transformers_makes_of_it(scales: torch.dtype) -> None:
    how = Fp8(block=(16, 32), scales=scales)
    packed = how.pack(64, 96, 3)
    values, scale = packed.parts.values()

    wanted = Fp8Dequantize(None)._dequantize_one(values, scale, torch.float32)

    got = decoded_rows(Fp8Format.of(how.config, "here").decoding, packed.parts, 0, 64)
    assert torch.equal(got, wanted)


def test_every_float8_has_its_value_in_the_verification_too(tmp_path: Path) -> None:
    codes = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).view(16, 16)
    tensors = {"m.weight": codes, "m.weight_scale_inv": torch.ones(1, 1)}
    save_file(tensors, tmp_path / "model.safetensors")
    said = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [16, 16]}}
    (tensor,) = unpacked(open_base(locate(tmp_path)), said).values()
    assert tensor.packing is not None

    raw = Unpacked(tensor, tensor.packing).read(0, 1024, memoryview(b""))

    np.testing.assert_array_equal(raw.view("<f4").reshape(16, 16), codes.float().numpy())

"""Bases that transformers quantised with bitsandbytes, which is the oracle of their values.

Rows are multiples of the block size here: bitsandbytes' kernel for CPUs gives others wrong values
(0.50), where its code for all devices, and raymeld, count blocks through the flattened weight.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from bitsandbytes import functional
from decoded_rows import decoded_rows
from handmade import TWO_LANES
from hypothesis import given, settings
from hypothesis import strategies as st
from models import DTYPES, deltas_of_adapter, make_adapter, read_tensors
from oracles import Tensors, assert_within_contract
from peft.utils.integrations import dequantize_bnb_weight
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from merge_core.decoding.four_bit import four_bit_decoding
from merge_core.errors import InputError
from merge_core.merge import merge
from merge_core.planner import make_plan
from merge_core.verify import verify

KINDS: dict[str, dict[str, Any]] = {
    "NF4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "NF4, double quantisation": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
    },
    "FP4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "FP4, double quantisation, stored as bfloat16": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "fp4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_quant_storage": torch.bfloat16,
    },
    "int8": {"load_in_8bit": True},
}
UP = "model.layers.0.mlp.up_proj"


def quantise(base: Path, path: Path, **how: Any) -> Tensors:
    """Save ``base`` quantised; all of its weights as bitsandbytes dequantises them."""
    model = AutoModelForCausalLM.from_pretrained(
        base, quantization_config=BitsAndBytesConfig(**how), device_map="cpu"
    )
    model.save_pretrained(path, max_shard_size="80KB")
    weights = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    layers = (bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt)
    for name, module in model.named_modules():
        if isinstance(module, layers):
            dequantised = dequantize_bnb_weight(module.weight, getattr(module, "state", None))
            weights[f"{name}.weight"] = dequantised.detach()
    return {name: weights[name] for name in read_tensors(base)}


@pytest.fixture(scope="module")
def plain(bases: Callable[..., Path]) -> Callable[[str], Path]:
    return lambda dtype: bases(dtype, intermediate_size=128)


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_result_is_what_bitsandbytes_decodes_plus_delta_rounded_once(
    kind: str, dtype: str, plain: Callable[[str], Path], tmp_path: Path, out: Path
) -> None:
    base = tmp_path / "base"
    weights = quantise(plain(dtype), base, **KINDS[kind])
    adapter = make_adapter(tmp_path / "adapter", plain(dtype), target_modules=["q_proj", "up_proj"])

    plan = make_plan(base, [adapter], dequantize=True, shard_bytes=60_000)
    merge(plan, out, choice=TWO_LANES)

    got, wanted = read_tensors(out), deltas_of_adapter(adapter)
    assert_within_contract(got, weights, wanted, DTYPES[dtype])
    assert verify(out, "numeric").findings == ()
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    assert len(plan.shards) > 3
    bits = 8 if "int8" in kind else 4
    assert plan.notes == (f"14 weights of the base decoded from bitsandbytes, {bits} bits",)


@settings(max_examples=60)
@given(
    shape=st.tuples(st.integers(1, 30), st.integers(1, 200)),
    kind=st.sampled_from(["nf4", "fp4"]),
    block=st.sampled_from([32, 64, 128]),
    nested=st.booleans(),
    dtype=st.sampled_from(list(DTYPES)),
    data=st.data(),
)
def test_rows_of_any_shape_are_those_of_the_flattened_weight(
    shape: tuple[int, int], kind: str, block: int, nested: bool, dtype: str, data: st.DataObject
) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(7)).to(DTYPES[dtype])
    packed, state = functional.quantize_4bit(
        weight, quant_type=kind, blocksize=block, compress_statistics=nested
    )
    parts = {"weight": packed, **{f"weight.{k}": v for k, v in state.as_dict(packed=True).items()}}
    codes = torch.stack([packed.view(-1) >> 4, packed.view(-1) & 15], 1).view(-1).int()
    absmax = state.absmax
    if nested:
        absmax = functional.dequantize_blockwise(absmax, state.state2) + state.offset
    scales = absmax.repeat_interleave(block)[: weight.numel()]
    whole = (state.code[codes[: weight.numel()]] * scales).to(weight.dtype).view(shape)

    top = data.draw(st.integers(0, shape[0] - 1))
    bottom = data.draw(st.integers(top + 1, shape[0]))
    assert torch.equal(decoded_rows(four_bit_decoding, parts, top, bottom), whole[top:bottom])


@pytest.fixture(scope="module", params=["NF4, double quantisation", "int8"])
def saved(
    request: pytest.FixtureRequest,
    plain: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A quantised base in one file."""
    path = tmp_path_factory.mktemp("saved") / "base"
    quantise(plain("BF16"), path, **KINDS[request.param])
    (path / "model.safetensors.index.json").unlink()
    tensors = read_tensors(path)
    for file in path.glob("*.safetensors"):
        file.unlink()
    save_file(tensors, path / "model.safetensors")
    return path


def refused(base: Path, adapter: Path, tensors: Tensors) -> str:
    file = base / "model.safetensors"
    before = file.read_bytes()
    save_file(tensors, file)
    try:
        with pytest.raises(InputError) as caught:
            make_plan(base, [adapter], dequantize=True)
    finally:
        file.write_bytes(before)
    return str(caught.value)


def test_every_part_is_accounted_for(
    saved: Path, plain: Callable[[str], Path], tmp_path: Path
) -> None:
    adapter = make_adapter(tmp_path / "adapter", plain("BF16"), target_modules=["q_proj"])
    tensors = load_file(saved / "model.safetensors")
    parts = [name for name in tensors if name.startswith(f"{UP}.")]
    assert len(parts) in (3, 6)
    for name in parts:
        lost = {key: tensor for key, tensor in tensors.items() if key != name}
        if not name.endswith("weight_format"):  # older versions did not write it
            assert f"module {UP}" in refused(saved, adapter, lost), name
        said = refused(saved, adapter, {**lost, f"{name}x": tensors[name]})
        assert UP in said, name
        flat = tensors[name].reshape(-1)
        longer = torch.cat([flat, flat[:1]])
        assert UP in refused(saved, adapter, {**lost, name: longer}), name


@pytest.mark.parametrize("saved", ["NF4, double quantisation"], indirect=True)
@pytest.mark.parametrize(
    "change",
    [
        {"blocksize": 0},
        {"blocksize": 128},
        {"shape": [128, 65]},
        {"shape": [8192]},
        {"dtype": "int4"},
        {"quant_type": "fp4"},
        {"nested_blocksize": 64},
        {"nested_offset": "2"},
        {"nested_dtype": "float16"},
    ],
)
def test_a_description_that_does_not_fit_is_refused(
    change: dict[str, Any], saved: Path, plain: Callable[[str], Path], tmp_path: Path
) -> None:
    adapter = make_adapter(tmp_path / "adapter", plain("BF16"), target_modules=["q_proj"])
    tensors = load_file(saved / "model.safetensors")
    name = f"{UP}.weight.quant_state.bitsandbytes__nf4"
    said = {**json.loads(tensors[name].numpy().tobytes()), **change}
    text = bytearray(json.dumps(said).encode())
    spoilt = {**tensors, name: torch.frombuffer(text, dtype=torch.uint8)}

    assert UP in refused(saved, adapter, spoilt)


@pytest.mark.parametrize("saved", ["int8"], indirect=True)
def test_columns_in_another_order_are_refused(
    saved: Path, plain: Callable[[str], Path], tmp_path: Path
) -> None:
    adapter = make_adapter(tmp_path / "adapter", plain("BF16"), target_modules=["q_proj"])
    tensors = load_file(saved / "model.safetensors")
    spoilt = {**tensors, f"{UP}.weight_format": torch.tensor(2, dtype=torch.uint8)}

    assert f"{UP}.weight_format is not 0" in refused(saved, adapter, spoilt)

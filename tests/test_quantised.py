"""A quantised base is merged into the 16 bits that it decodes to."""

from __future__ import annotations

import json
import pickle
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from handmade import (
    TWO_LANES,
    Geometry,
    deltas_of,
    random_factors,
    write_adapter,
    write_base,
    write_json,
)
from models import assert_same_tensors, edit_json, make_adapter, oracle, read_tensors
from oracles import assert_within_contract
from packers import Awq, AwqGemv, Format, Fp8, Gptq, QuantisedBase, write_quantised
from test_inputs_that_change import touching
from typer.testing import CliRunner

from cluster.cli import app
from cluster.estimate import DECODING_SPEED
from merge_core.decoding import Decoding
from merge_core.errors import StorageError
from merge_core.ledger import Receipt
from merge_core.memory import lane_need
from merge_core.merge import merge
from merge_core.planner import make_plan
from merge_core.stores.location import locate
from merge_core.verify import verify
from merge_core.verify.packed import unpacked
from merge_core.verify.weights import open_base

GEOMETRY = Geometry(hidden=64, inner=128)
FACTORS = random_factors(GEOMETRY.linear, dict.fromkeys(GEOMETRY.linear, 4))
HALF, BRAIN = torch.float16, torch.bfloat16
KINDS: dict[str, tuple[Format, torch.dtype]] = {
    "GPTQ, 4 bits": (Gptq(), HALF),
    "GPTQ, 8 bits in one group": (Gptq(bits=8, group=-1), HALF),
    "GPTQ, 3 bits in the order of activations": (Gptq(bits=3, group=32, shuffled=True), HALF),
    "GPTQ, 2 bits, format v2": (Gptq(bits=2, second=True), HALF),
    "GPTQ, 4 bits in a bfloat16 model": (Gptq(scales=BRAIN), BRAIN),
    "AWQ": (Awq(), HALF),
    "AWQ for gemv": (AwqGemv(), HALF),
    "AWQ for gemv_fast": (AwqGemv(group=64, fast=True), HALF),
    "FP8 in blocks that end outside": (Fp8(block=(48, 40)), BRAIN),
    "FP8 with one scale": (Fp8(block=None, scales=torch.float32), BRAIN),
}


@pytest.fixture(params=KINDS)
def base(request: pytest.FixtureRequest, tmp_path: Path) -> QuantisedBase:
    how, dtype = KINDS[request.param]
    made = write_quantised(tmp_path / "base", how, GEOMETRY, dtype=dtype)
    write_json(made.path / "quantize_config.json", how.config)
    return made


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "adapter", FACTORS, r=4, lora_alpha=8)


def test_the_result_is_decoded_plus_delta_rounded_once_to_the_dtype_of_the_config(
    base: QuantisedBase, adapter: Path, out: Path
) -> None:
    plan = make_plan(base.path, [adapter], dequantize=True, shard_bytes=30_000)
    result = merge(plan, out, choice=TWO_LANES)

    config = json.loads((base.path / "config.json").read_text())
    dtype = getattr(torch, config["torch_dtype"])
    assert_within_contract(read_tensors(out), base.weights, deltas_of(FACTORS, 2.0), dtype)
    assert verify(out, "numeric").findings == ()
    assert len(plan.shards) > 3
    del config["quantization_config"]
    assert json.loads((out / "config.json").read_text()) == config
    assert (out / "tokenizer.json").exists()
    assert not (out / "quantize_config.json").exists()
    assert "quantize_config.json is left out: it describes packed weights" in plan.notes
    assert bytes_read(result.receipts) == sum(
        file.stat().st_size - 8 - int.from_bytes(file.read_bytes()[:8], "little")
        for file in base.path.glob("*.safetensors")
    )


def bytes_read(receipts: tuple[Receipt, ...]) -> int:
    return sum(tensor.bytes_read for receipt in receipts for tensor in receipt.tensors)


def test_weights_that_no_adapter_touches_are_decoded(
    base: QuantisedBase, tmp_path: Path, out: Path
) -> None:
    one = next(iter(FACTORS))
    adapter = write_adapter(tmp_path / "one", {one: FACTORS[one]}, r=4, lora_alpha=8)

    plan = make_plan(base.path, [adapter], dequantize=True, dtype="bfloat16")
    merge(plan, out, choice=TWO_LANES)

    got = read_tensors(out)
    for name, tensor in base.weights.items():
        if name != f"{one}.weight":
            assert torch.equal(got[name], tensor.to(BRAIN)), name
    assert verify(out, "numeric").findings == ()
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_a_wrong_value_of_a_decoded_weight_is_found(
    base: QuantisedBase, adapter: Path, out: Path
) -> None:
    merge(make_plan(base.path, [adapter], dequantize=True), out, choice=TWO_LANES)
    scales = "model.layers.0.mlp.up_proj.weight_scale_inv"
    wrong = write_quantised(
        out.parent / "wrong",
        base.how,
        GEOMETRY,
        dtype=base.weights["model.norm.weight"].dtype,
        change=lambda tensors: tensors[scales if scales in tensors else up("scales")].mul_(2),
    )

    found = verify(out, "numeric", base=locate(wrong.path)).findings
    assert {finding.where.split(": ")[1].split(",")[0] for finding in found} == {up("weight")}


def up(part: str) -> str:
    return f"model.layers.0.mlp.up_proj.{part}"


def test_the_result_is_peft_s_on_the_decoded_model_to_the_bit(tmp_path: Path, out: Path) -> None:
    how = Gptq(group=32, shuffled=True)
    base = write_quantised(tmp_path / "base", how, GEOMETRY)
    config = json.loads((base.path / "config.json").read_text())
    del config["quantization_config"]
    plain = write_base(tmp_path / "plain", base.weights, config)
    adapter = make_adapter(tmp_path / "adapter", plain)

    merge(make_plan(base.path, [adapter], dequantize=True, shard_bytes=30_000), out)

    assert_same_tensors(read_tensors(out), oracle(plain, adapter))


@pytest.mark.parametrize("lora", [{"use_dora": True}, {"modules_to_save": ["up_proj", "lm_head"]}])
def test_other_adapters_merge_into_decoded_weights_too(
    lora: dict[str, Any], tmp_path: Path, out: Path
) -> None:
    how = Awq()
    base = write_quantised(tmp_path / "base", how, GEOMETRY)
    config = json.loads((base.path / "config.json").read_text())
    del config["quantization_config"]
    plain = write_base(tmp_path / "plain", base.weights, config)
    adapter = make_adapter(tmp_path / "adapter", plain, target_modules=["q_proj", "v_proj"], **lora)

    merge(make_plan(base.path, [adapter], dequantize=True), out, choice=TWO_LANES)

    assert_same_tensors(read_tensors(out), oracle(plain, adapter))
    assert verify(out, "numeric").findings == ()


LAYER = "model.layers.{}.{}"
DYNAMIC = {
    r"-:.*\.1\.self_attn\.(q|k)_proj": {},
    r"+:model\.layers\.0\.mlp\.down": {"bits": 8, "group_size": 64, "sym": True},
    r".*\.down_proj$": {"group_size": 32, "desc_act": True},
}
"""The first that matches counts."""
OTHERS = {
    LAYER.format(1, "self_attn.q_proj"): None,
    LAYER.format(1, "self_attn.k_proj"): None,
    LAYER.format(0, "mlp.down_proj"): Gptq(bits=8, group=64),
    LAYER.format(1, "mlp.down_proj"): Gptq(group=32, shuffled=True),
}


def test_modules_that_gptqmodel_packed_otherwise_are_decoded_as_they_are(
    tmp_path: Path, adapter: Path, out: Path
) -> None:
    base = write_quantised(tmp_path / "b", Gptq(), GEOMETRY, others=OTHERS, dynamic=DYNAMIC)

    plan = make_plan(base.path, [adapter], dequantize=True, shard_bytes=30_000)
    merge(plan, out, choice=TWO_LANES)

    assert_within_contract(read_tensors(out), base.weights, deltas_of(FACTORS, 2.0), HALF)
    assert verify(out, "numeric").findings == ()
    assert "12 weights of the base decoded from GPTQ, 4 bits, others by module" in plan.notes


def test_gptqmodel_calls_the_zeros_of_gemv_fast_otherwise(
    tmp_path: Path, adapter: Path, out: Path
) -> None:
    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.endswith(".scaled_zeros")]:
            tensors[name.replace("scaled_zeros", "qzeros")] = tensors.pop(name)

    how, said = AwqGemv(group=64, fast=True), {"format": "gemv_fast", "pack_dtype": "int16"}
    base = write_quantised(tmp_path / "b", how, GEOMETRY, change=rename, version=None, **said)

    merge(make_plan(base.path, [adapter], dequantize=True), out, choice=TWO_LANES)

    assert_within_contract(read_tensors(out), base.weights, deltas_of(FACTORS, 2.0), HALF)
    assert verify(out, "numeric").findings == ()


def test_the_biases_of_zeros_that_gptq_wrote_are_left_out(
    tmp_path: Path, adapter: Path, out: Path
) -> None:
    biases = {f"{path}.bias": shape[:1] for path, shape in GEOMETRY.linear.items() if "mlp" in path}

    def write(path: Path, value: float) -> Path:
        def add(tensors: dict[str, torch.Tensor]) -> None:
            tensors |= {name: torch.full(n, value, dtype=HALF) for name, n in biases.items()}

        return write_quantised(path, Gptq(), GEOMETRY, change=add).path

    plan = make_plan(write(tmp_path / "base", 0.0), [adapter], dequantize=True)
    merge(plan, out, choice=TWO_LANES)

    assert read_tensors(out).keys() == GEOMETRY.shapes.keys()
    assert any(note.startswith("6 tensors left out, biases of zeros") for note in plan.notes)
    assert verify(out, "numeric").findings == ()
    with pytest.raises(ValueError, match=r"6 problems") as caught:
        make_plan(write(tmp_path / "other", 1.0), [adapter], dequantize=True)
    assert f"tensor '{up('bias')}' is a bias that the model has no place for" in str(caught.value)


def test_a_lane_s_share_of_packed_weights_is_part_of_what_it_needs(
    tmp_path: Path, adapter: Path
) -> None:
    base = write_quantised(tmp_path / "base", Gptq(), GEOMETRY)
    need = lane_need(make_plan(base.path, [adapter], dequantize=True), "cpu", 1 << 20)

    largest = 64 * 128
    packed = largest // 2 + 2 * (largest // 16) + largest // 32 + 4 * 128
    assert packed + 20 * largest <= need.decoded <= packed + 20 * largest + 10_000
    assert need.on_host(2, "cpu") - need.on_host(1, "cpu") > need.decoded


def test_the_command_decodes_where_it_is_asked_to_and_says_how(
    tmp_path: Path, adapter: Path
) -> None:
    base = write_quantised(tmp_path / "base", Gptq(), GEOMETRY).path
    words = ["plan", str(base), str(adapter), "--json"]

    refused = CliRunner().invoke(app, words)
    assert refused.exit_code == 2
    assert "quantised ('gptq')" in refused.output
    assert "Give --dequantize" in refused.output
    assert "problems" not in refused.output  # not what the packed names look like unpacked

    done = CliRunner().invoke(app, [*words, "--dequantize"])
    assert done.exit_code == 0
    told = json.loads(done.stdout)
    assert told["notes"] == ["14 weights of the base decoded from GPTQ, 4 bits"]
    assert told["tensors"]["merged"] == 14

    edit_json(base / "config.json", quantization_config=None)
    done = CliRunner().invoke(app, [*words, "--dequantize"])
    assert done.exit_code == 2
    assert "the base is not quantised" in done.output


def test_a_packed_file_that_is_replaced_during_the_merge_is_named(
    base: QuantisedBase, adapter: Path, out: Path
) -> None:
    plan = make_plan(base.path, [adapter], dequantize=True, shard_bytes=30_000)
    file = base.path / "model-00002-of-00002.safetensors"

    with pytest.raises(StorageError, match="changed while it was being merged") as caught:
        merge(plan, out, choice=TWO_LANES, watch=touching(file, "merging"))
    assert caught.value.where == str(file)


def test_plan_and_checks_can_be_sent_to_workers(base: QuantisedBase, adapter: Path) -> None:
    plan = make_plan(base.path, [adapter], dequantize=True)

    assert pickle.loads(pickle.dumps(plan)) == plan
    config = json.loads((base.path / "config.json").read_text())
    tensors = unpacked(open_base(locate(base.path)), config)
    assert pickle.loads(pickle.dumps(tensors)) == tensors
    assert len(set(tensors.values())) == len(GEOMETRY.shapes)


def test_every_decoding_has_a_speed_to_reckon_with() -> None:
    kinds = {field.default for one in get_args(Decoding) for field in fields(one)[-1:]}

    assert kinds == DECODING_SPEED.keys()
    assert len(kinds) == len(get_args(Decoding))

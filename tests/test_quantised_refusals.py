"""Every packed tensor of a quantised base is accounted for, or the plan is refused and names it."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from handmade import TWO_LANES, Geometry, random_factors, write_adapter
from models import edit_json
from oracles import Tensors
from packers import Awq, AwqGemv, Format, Fp8, Gptq, write_quantised

from merge_core.errors import InputError, NonFiniteError
from merge_core.merge import merge
from merge_core.planner import make_plan

GEOMETRY = Geometry(hidden=64, inner=128, layers=1)
FACTORS = random_factors(GEOMETRY.linear, dict.fromkeys(GEOMETRY.linear, 4))
UP, DOWN = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"
PARTS: dict[Format, tuple[str, ...]] = {
    Gptq(shuffled=True): ("qweight", "qzeros", "scales", "g_idx"),
    Awq(): ("qweight", "qzeros", "scales"),
    AwqGemv(): ("qweight", "qzeros", "scales"),
    AwqGemv(fast=True): ("qweight", "scales", "scaled_zeros"),
    Fp8(): ("weight", "weight_scale_inv"),
}
EACH = [(how, part) for how, parts in PARTS.items() for part in parts]


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "adapter", FACTORS, r=4, lora_alpha=8)


@pytest.fixture
def refusal(tmp_path: Path, adapter: Path) -> Callable[..., str]:
    """What a plan says of a base that was spoilt."""

    def refused(how: Format, change: Callable[[Tensors], object] = dict, **fields: Any) -> str:
        base = write_quantised(tmp_path / "base", how, GEOMETRY, change=change).path
        if fields:
            said = {**how.config, **fields}
            edit_json(base / "config.json", quantization_config=said)
        with pytest.raises(InputError) as caught:
            make_plan(base, [adapter], dequantize=True)
        return str(caught.value)

    return refused


@pytest.mark.parametrize(("how", "part"), EACH)
def test_a_missing_part_is_named(how: Format, part: str, refusal: Callable[..., str]) -> None:
    said = refusal(how, lambda tensors: tensors.pop(f"{UP}.{part}"))

    assert f"module {UP}: {UP}.{part} is missing" in said


@pytest.mark.parametrize(("how", "part"), EACH)
def test_a_renamed_part_is_named(how: Format, part: str, refusal: Callable[..., str]) -> None:
    def rename(tensors: Tensors) -> None:
        tensors[f"{UP}.{part}s"] = tensors.pop(f"{UP}.{part}")

    said = refusal(how, rename)

    assert f"{UP}.{part} is missing" in said
    if "scale" not in part:  # what is no value is left over, too
        assert re.search(rf"tensor '{UP}.{part}s' is \w+, and no part of a packed weight", said)


@pytest.mark.parametrize("dim", [0, -1])
@pytest.mark.parametrize(("how", "part"), EACH)
def test_a_part_of_another_shape_is_named(
    how: Format, part: str, dim: int, refusal: Callable[..., str]
) -> None:
    def grow(tensors: Tensors) -> None:
        tensor = tensors[f"{UP}.{part}"]
        raw = tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor
        tensors[f"{UP}.{part}"] = torch.cat([raw, raw.narrow(dim, 0, 1)], dim).view(tensor.dtype)

    assert UP in refusal(how, grow)


@pytest.mark.parametrize(("how", "part"), EACH)
def test_a_part_of_another_dtype_is_named(
    how: Format, part: str, refusal: Callable[..., str]
) -> None:
    def cast(tensors: Tensors) -> None:
        tensors[f"{UP}.{part}"] = tensors[f"{UP}.{part}"].to(torch.int64)

    assert f"{UP}.{part} is I64" in refusal(how, cast)


@pytest.mark.parametrize("how", PARTS)
def test_what_is_wrong_with_several_modules_is_told_at_once(
    how: Format, refusal: Callable[..., str]
) -> None:
    def spoil(tensors: Tensors) -> None:
        for module in (UP, DOWN):
            del tensors[f"{module}.{PARTS[how][1]}"]

    said = refusal(how, spoil)

    assert said.startswith("2 problems:")
    assert f"module {UP}:" in said
    assert f"module {DOWN}:" in said


def test_zeros_that_are_there_under_two_names_are_named(refusal: Callable[..., str]) -> None:
    def add(tensors: Tensors) -> None:
        tensors[f"{UP}.qzeros"] = tensors[f"{UP}.scaled_zeros"].clone()

    said = refusal(AwqGemv(fast=True), add)

    assert f"{UP} has both qzeros and scaled_zeros" in said


def test_a_weight_that_is_there_beside_its_packed_parts_is_named(
    refusal: Callable[..., str],
) -> None:
    def add(tensors: Tensors) -> None:
        tensors[f"{UP}.weight"] = torch.zeros(128, 64, dtype=torch.float16)

    assert f"tensor '{UP}.weight' is there beside its packed parts" in refusal(Gptq(), add)


@pytest.mark.parametrize(
    ("how", "fields", "named"),
    [
        (Gptq(), {"bits": 5}, "bits = 5, not 2, 3, 4 or 8"),
        (Gptq(), {"bits": True}, "bits = True"),
        (Gptq(), {"bits": 8}, f"module {UP}"),
        (Gptq(), {"group_size": 32}, f"module {UP}"),
        (Gptq(), {"group_size": 0}, "group_size = 0"),
        (Gptq(), {"desc_act": "yes"}, "desc_act = 'yes'"),
        (Gptq(), {"checkpoint_format": "marlin"}, "checkpoint_format = 'marlin'"),
        (Gptq(second=True), {"format": "gptq"}, "contradict each other"),
        (Gptq(), {"dynamic": {"-:.*up_proj": {}}}, "says in dynamic that it is not packed"),
        (Gptq(), {"dynamic": {".*up_proj": {"bits": 8}}}, f"module {UP}"),
        (Gptq(), {"dynamic": {".*": {"bits": 5}}}, "dynamic '.*': quantization_config has bits"),
        (Gptq(), {"dynamic": {".*": {"rotation": 1}}}, "rotation = 1, which is not known"),
        (Gptq(), {"dynamic": {"(": {}}}, "not a map of regexes"),
        (Gptq(), {"dynamic": {"(a+)+": {}}}, "not a map of regexes"),
        (Gptq(), {"dynamic": {r"\1": {}}}, "not a map of regexes"),
        (Gptq(), {"dynamic": {"a": 4}}, "not a map of regexes"),
        (Gptq(), {"quant_method": "hqq"}, "quantised ('hqq'), which is not decoded"),
        (Gptq(), {"quant_method": "awq"}, "checkpoint"),
        (Gptq(), {"quant_method": "fp8"}, "bits = 4, which is not known"),
        (Awq(), {"version": "llm-awq"}, "version = 'llm-awq', not gemm, gemv or gemv_fast"),
        (Awq(), {"format": "gemv"}, "two layouts of AWQ, gemm and gemv"),
        (Awq(), {"version": "gemv"}, "group_size = 16, which AutoAWQ does not pack for gemv"),
        (AwqGemv(), {"group_size": -1}, "group_size = -1, which AutoAWQ does not pack for gemv"),
        (AwqGemv(), {"version": "gemm"}, f"module {UP}"),
        (AwqGemv(fast=True), {"version": "gemv"}, f"module {UP}"),
        (AwqGemv(), {"group_size": 64}, f"module {UP}"),
        (Awq(), {"zero_point": False}, "zero_point = False"),
        (Awq(), {"bits": 8}, "bits = 8"),
        (Fp8(), {"activation_scheme": "static"}, "activation_scheme = 'static'"),
        (Fp8(), {"weight_block_size": [32]}, "weight_block_size = [32]"),
        (Fp8(), {"weight_block_size": None}, f"module {UP}"),
        (Fp8(), {"weight_block_size": [1 << 21, 1 << 21]}, "weight_block_size = [2097152, 20"),
        (Fp8(), {"scale_fmt": "ue8m0"}, "scale_fmt = 'ue8m0'"),
        (Fp8(), {"quant_method": "bitsandbytes", "load_in_4bit": True}, "is not known"),
    ],
)
def test_what_the_config_says_is_understood_or_named(
    how: Format, fields: dict[str, Any], named: str, refusal: Callable[..., str]
) -> None:
    assert named in refusal(how, **fields)


def test_layers_that_lie_the_other_way_are_refused(tmp_path: Path, adapter: Path) -> None:
    base = write_quantised(tmp_path / "base", Gptq(), GEOMETRY).path
    edit_json(base / "config.json", model_type="gpt2")

    with pytest.raises(InputError, match=r"its layers store \[in, out\]"):
        make_plan(base, [adapter], dequantize=True)


def test_a_base_that_names_no_dtype_needs_one(tmp_path: Path, adapter: Path) -> None:
    base = write_quantised(tmp_path / "base", Fp8(), GEOMETRY).path
    edit_json(base / "config.json", torch_dtype=None)

    with pytest.raises(InputError, match=r"names no dtype .*Give --dtype"):
        make_plan(base, [adapter], dequantize=True)

    plan = make_plan(base, [adapter], dequantize=True, dtype="bfloat16")
    assert {task.target.dtype for task in plan.tasks} == {"BF16"}


@pytest.mark.parametrize("dequantize", [False, True])
def test_the_file_that_alone_describes_packed_weights_is_named(
    dequantize: bool, tmp_path: Path, adapter: Path
) -> None:
    base = write_quantised(tmp_path / "base", Gptq(), GEOMETRY).path
    edit_json(base / "config.json", quantization_config=None)
    (base / "quantize_config.json").write_text('{"bits": 4, "group_size": 16, "desc_act": false}')

    with pytest.raises(InputError, match=r"which quantize_config\.json describes") as caught:
        make_plan(base, [adapter], dequantize=dequantize)

    assert len(caught.value.problems) == 1


def test_a_group_index_is_asked_for_where_its_order_counts(refusal: Callable[..., str]) -> None:
    said = refusal(Gptq(without_index=True), desc_act=True)

    assert f"{UP}.g_idx is missing" in said


@pytest.mark.parametrize(
    ("part", "value", "named"),
    [
        ("g_idx", 99, "names group 99, and there are 4"),
        ("g_idx", -1, "names group -1, and there are 4"),
        ("qzeros", -1, "a zero point of 16"),
    ],
)
def test_numbers_that_mean_nothing_end_the_merge(
    part: str, value: int, named: str, tmp_path: Path, adapter: Path
) -> None:
    def spoil(tensors: Tensors) -> None:
        tensors[f"{UP}.{part}"].fill_(value)

    base = write_quantised(tmp_path / "base", Gptq(), GEOMETRY, change=spoil).path
    plan = make_plan(base, [adapter], dequantize=True)

    with pytest.raises(InputError, match=named) as caught:
        merge(plan, tmp_path / "out", choice=TWO_LANES)
    assert f"tensor '{UP}.{part}'" in str(caught.value)
    assert not (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize(
    ("how", "part", "dtype"), [(Gptq(), "scales", "float16"), (Fp8(), "weight", "float32")]
)
def test_a_decoded_weight_that_is_not_finite_ends_the_merge_untouched_as_it_is(
    how: Format, part: str, dtype: str, tmp_path: Path
) -> None:
    def spoil(tensors: Tensors) -> None:
        bits = tensors[f"{UP}.{part}"].view(torch.int16 if part == "scales" else torch.int8)
        bits[0, 0] = 0x7C00 if part == "scales" else 0x7F  # infinity; NaN, which E4M3 alone has

    base = write_quantised(tmp_path / "base", how, GEOMETRY, change=spoil).path
    adapter = write_adapter(tmp_path / "adapter", {DOWN: FACTORS[DOWN]}, r=4, lora_alpha=8)
    plan = make_plan(base, [adapter], dequantize=True, dtype=dtype)

    with pytest.raises(NonFiniteError, match=f"{UP}.weight"):
        merge(plan, tmp_path / "out", choice=TWO_LANES)
    assert not (tmp_path / "out" / "config.json").exists()

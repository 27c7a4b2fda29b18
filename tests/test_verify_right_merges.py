"""``verify`` calls right what PEFT merged: every kind of adapter, dtype and layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from merged_by_hand import FIRST, NORM, found, merged_names, write_json, write_out, write_weights
from models import edit_json, make_adapter, make_base, oracle, read_tensors
from oracles import Tensors
from safetensors.torch import load_file

from merge_core.stores.location import locate
from merge_core.verify import LEVELS, verify


@pytest.mark.parametrize("level", LEVELS)
def test_peft_s_own_merge_is_right(level: str, finished: Path, wanted: Tensors) -> None:
    report = verify(finished, level)

    assert report.findings == ()
    assert report.ok
    assert (report.out, report.level, report.files, report.tensors) == (
        locate(finished),
        level,
        2,
        len(wanted),
    )
    nbytes = sum(tensor.numel() * tensor.element_size() for tensor in wanted.values())
    times = {"structure": 0, "digest": 1, "load": 1, "numeric": 3}[level]
    assert report.bytes_read == times * nbytes
    assert report.seconds > 0
    assert len(report.checks) == {"structure": 2, "digest": 3, "numeric": 4, "load": 4}[level]


ADAPTERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "rank-stabilised": ({}, {"use_rslora": True}),
    "patterns": ({}, {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {".*.1.mlp.*": 5}}),
    "bin": ({}, {"safe": False}),
    "bfloat16 factors": ({}, {"dtype": torch.bfloat16}),
    "float16": ({"dtype": torch.float16}, {}),
    "float32": ({"dtype": torch.float32}, {}),
    "tied": ({"tie_word_embeddings": True}, {"target_modules": ["up_proj"]}),
    "one rank": ({}, {"r": 1, "lora_alpha": 3}),
}


@pytest.mark.parametrize("story", ADAPTERS)
def test_each_kind_of_adapter_is_understood(story: str, tmp_path: Path) -> None:
    base_fields, lora = ADAPTERS[story]
    base = make_base(tmp_path / "base", **base_fields)
    adapter = make_adapter(tmp_path / "adapter", base, **lora)
    plain = make_adapter(tmp_path / "plain", base, **{**lora, "safe": True})
    tensors, actions = oracle(base, adapter), merged_names(plain)
    out = write_out(tmp_path / "out", tensors, actions, base=base, adapters={adapter: 1.0})

    assert found(out, "numeric") == []
    assert found(out, "load") == []
    doubled = found(out, "numeric", adapters=[(adapter, 2.0)])
    assert {check for check, _ in doubled} == {"merged"}
    assert len(doubled) == len(actions)


def test_several_adapters_are_summed_before_one_rounding(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    other = make_adapter(tmp_path / "other", base, r=4, seed=2, use_rslora=True)
    tensors = read_tensors(base)
    for name in merged_names(adapter):
        total = tensors[name].float()
        for path, scale in ((adapter, 0.5 * 12 / 8), (other, -1.5 * 16 / 4**0.5)):
            factors = load_file(path / "adapter_model.safetensors")
            module = f"base_model.model.{name.removesuffix('.weight')}"
            b, a = factors[f"{module}.lora_B.weight"], factors[f"{module}.lora_A.weight"]
            total = total + (b @ a) * scale
        tensors[name] = total.to(torch.bfloat16)
    weights = {adapter: 0.5, other: -1.5}
    out = write_out(tmp_path / "out", tensors, merged_names(adapter), base=base, adapters=weights)

    assert found(out, "numeric") == []

    left_out = found(out, "numeric", adapters=[(adapter, 0.5)])
    assert {check for check, _ in left_out} == {"merged"}
    assert len(left_out) == len(merged_names(adapter))
    swapped = found(out, "numeric", adapters=[(adapter, -1.5), (other, 0.5)])
    assert len(swapped) == len(merged_names(adapter))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_converted_merge(base: Path, adapter: Path, dtype: torch.dtype, tmp_path: Path) -> None:
    """PEFT on the base in another dtype: bfloat16 to float32 is exact, so this is one rounding."""
    wide = make_base(tmp_path / "wide", dtype=torch.float32)
    write_weights(
        wide / "model.safetensors",
        {n: t.float() for n, t in read_tensors(base).items()},
    )
    tensors = {name: tensor.to(dtype) for name, tensor in oracle(wide, adapter).items()}
    actions = dict.fromkeys(tensors, "converted") | merged_names(adapter)
    out = write_out(tmp_path / "out", tensors, actions, base=base, adapters={adapter: 1.0})

    assert found(out, "numeric") == []

    tensors[NORM] = tensors[NORM].clone()
    tensors[NORM][5] *= 1 + 2**-10
    out = write_out(out, tensors, actions, base=base, adapters={adapter: 1.0})
    assert found(out, "numeric") == [("converted", f"{FIRST}: {NORM}, row 5")]


def test_transposed_layers_are_understood(tmp_path: Path) -> None:
    """Conv1D, as in GPT-2: the weight is [in, out]."""
    torch.manual_seed(0)
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    shapes = {"h.0.c_fc": (6, 10), "h.0.c_proj": (6, 6)}
    tensors = {f"{module}.weight": torch.randn(shape) for module, shape in shapes.items()}
    for path in (base, adapter):
        path.mkdir()
    write_json(base / "config.json", {"model_type": "gpt2"})
    write_weights(base / "model.safetensors", tensors)
    fields = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "fan_in_fan_out": True}
    write_json(adapter / "adapter_config.json", fields)
    factors = {}
    for module, (into, out_) in shapes.items():
        a, b = torch.randn(3, into), torch.randn(out_, 3)
        factors[f"base_model.model.{module}.lora_A.weight"] = a
        factors[f"base_model.model.{module}.lora_B.weight"] = b
        tensors[f"{module}.weight"] = tensors[f"{module}.weight"] + ((b @ a) * 2).T
    write_weights(adapter / "adapter_model.safetensors", factors)
    out = write_out(
        tmp_path / "out",
        tensors,
        dict.fromkeys(tensors, "merged"),
        base=base,
        adapters={adapter: 1.0},
        files=1,
    )

    assert found(out, "numeric") == []
    edit_json(adapter / "adapter_config.json", fan_in_fan_out=False)
    assert found(out, "numeric") == []  # the class of the layer decides


def test_the_oracle_is_what_the_template_holds(template: Path, wanted: Tensors) -> None:
    assert read_tensors(template).keys() == wanted.keys()

"""The merge computes what PEFT's ``merge_and_unload()`` computes, bit by bit."""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from handmade import published
from models import (
    DTYPES,
    assert_same_tensors,
    deltas_of_adapter,
    edit_json,
    make_adapter,
    make_gpt2,
    oracle,
    read_tensors,
)
from oracles import assert_within_contract
from peft import PeftModel
from transformers import AutoModelForCausalLM

from merge_core.merge import merge
from merge_core.planner import make_plan

Q0, Q1 = (f"model.layers.{n}.self_attn.q_proj.weight" for n in (0, 1))

FEATURES: dict[str, dict[str, Any]] = {
    "r 8, alpha 16": {},
    "alpha / r is no power of two": {"r": 6, "lora_alpha": 10},
    "alpha is no whole number": {"r": 4, "lora_alpha": 2.7},
    "rank-stabilised": {"r": 5, "lora_alpha": 7, "use_rslora": True},
    "rank and alpha patterns that overlap": {
        "rank_pattern": {"q_proj": 3, "k_proj|v_proj": 5, "layers.1.mlp.*": 2},
        "alpha_pattern": {"mlp.down_proj": 3, r"layers.\d.mlp.*": 24, "^model.layers.0.*": 5},
    },
    "rank-stabilised patterns": {
        "use_rslora": True,
        "rank_pattern": {"^model.layers.1.self_attn.*": 3},
        "alpha_pattern": {"o_proj": 11},
    },
    "q_proj and v_proj only": {"target_modules": ["q_proj", "v_proj"]},
    "one layer only": {"layers_to_transform": [1]},
    "every linear layer but some": {"target_modules": "all-linear", "exclude_modules": ["o_proj"]},
    "adapter_model.bin": {"safe": False},
    "rank 1": {"r": 1, "lora_alpha": 3, "target_modules": ["up_proj", "o_proj"]},
}


def check_like_peft(base: Path, adapter: Path, out: Path) -> None:
    merge(make_plan(base, [adapter], shard_bytes=70_000), out)

    assert_same_tensors(read_tensors(out), oracle(base, adapter))


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_kind_of_adapter_merges_as_peft_does(
    dtype: str, feature: str, bases: Callable[..., Path], tmp_path: Path, out: Path
) -> None:
    base = bases(dtype, shard="80KB")
    adapter = make_adapter(tmp_path / "adapter", base, **FEATURES[feature])

    check_like_peft(base, adapter, out)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("files", ["50GB", "40KB"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_kind_of_base_merges_as_peft_does(
    dtype: str, files: str, tied: bool, bases: Callable[..., Path], tmp_path: Path, out: Path
) -> None:
    base = bases(dtype, shard=files, tie_word_embeddings=tied)
    adapter = make_adapter(tmp_path / "adapter", base, lora_alpha=12)

    check_like_peft(base, adapter, out)
    assert ("lm_head.weight" in read_tensors(out)) is not tied


def test_the_first_pattern_in_the_file_counts_not_the_first_in_the_alphabet(
    base: Path, adapter_copy: Path, tmp_path: Path
) -> None:
    merged = {}
    for name, keys in {"sorted": ["layers.1.*", "q_proj"], "own": ["q_proj", "layers.1.*"]}.items():
        pattern = {key: 12 + 3 * (key == "q_proj") for key in keys}
        edit_json(adapter_copy / "adapter_config.json", alpha_pattern=pattern)
        out = tmp_path / name
        check_like_peft(base, adapter_copy, out)
        merged[name] = read_tensors(out)

    assert torch.equal(merged["sorted"][Q0], merged["own"][Q0])
    assert not torch.equal(merged["sorted"][Q1], merged["own"][Q1])


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to")
@pytest.mark.parametrize("flag", [True, False])
@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_transposed_layers_merge_as_peft_does_whatever_the_flag_says(
    dtype: str, flag: bool, tmp_path: Path, out: Path
) -> None:
    base = make_gpt2(tmp_path / "base", DTYPES[dtype])
    modules = ["c_attn", "c_proj", "c_fc"]  # attn.c_proj is square: only the layer's class tells
    fields = {"r": 6, "lora_alpha": 10, "fan_in_fan_out": True, "target_modules": modules}
    adapter = make_adapter(tmp_path / "adapter", base, **fields)
    edit_json(adapter / "adapter_config.json", fan_in_fan_out=flag)

    check_like_peft(base, adapter, out)


@pytest.mark.parametrize("dtype", DTYPES)
def test_matrices_of_many_blocks_and_cells_merge_as_peft_does(
    dtype: str, tmp_path: Path, bases: Callable[..., Path], out: Path
) -> None:
    """A cell of 8 MiB ends inside a row of down_proj; no number of rows is a multiple of 16."""
    sizes = {"hidden_size": 516, "intermediate_size": 9003, "num_hidden_layers": 1}
    base = bases(dtype, **sizes, num_attention_heads=6, vocab_size=50)
    fields = {"target_modules": ["up_proj", "down_proj"], "r": 7, "lora_alpha": 10}
    adapter = make_adapter(tmp_path / "adapter", base, **fields)

    check_like_peft(base, adapter, out)


@pytest.mark.parametrize("factors", ["BF16", "F16"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sixteen_bit_factors_are_used_at_full_precision(
    dtype: str, factors: str, bases: Callable[..., Path], tmp_path: Path, out: Path
) -> None:
    base = bases(dtype, shard="80KB")
    adapter = make_adapter(tmp_path / "adapter", base, dtype=DTYPES[factors], scale=0.01, r=7)

    merge(make_plan(base, [adapter]), out)

    assert_within_contract(read_tensors(out), read_tensors(base), deltas_of_adapter(adapter))


@pytest.mark.parametrize("dtype", DTYPES)
def test_several_weighted_adapters_are_summed_before_the_one_rounding(
    dtype: str, bases: Callable[..., Path], tmp_path: Path, out: Path
) -> None:
    base = bases(dtype, shard="80KB")
    fields: list[dict[str, Any]] = [
        {"r": 4},
        {"r": 6, "lora_alpha": 10, "target_modules": ["q_proj", "down_proj"], "safe": False},
        {"use_rslora": True, "dtype": torch.bfloat16, "rank_pattern": {"q_proj": 3}},
    ]
    adapters = [
        make_adapter(tmp_path / str(n), base, seed=n, scale=0.01, **options)
        for n, options in enumerate(fields)
    ]
    weights = [0.7, -0.5, 1.0]

    named = [f"{path}@{weight}" for path, weight in zip(adapters, weights, strict=True)]
    merge(make_plan(base, named), out)

    deltas = deltas_of_adapter(*adapters, weights=weights)
    assert len(deltas[Q0]) == 3
    assert_within_contract(read_tensors(out), read_tensors(base), deltas)


@pytest.mark.parametrize("into", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_tensor_is_converted_with_one_rounding(
    dtype: str, into: str, bases: Callable[..., Path], tmp_path: Path, out: Path
) -> None:
    base = bases(dtype, shard="80KB")
    adapter = make_adapter(tmp_path / "adapter", base, scale=0.01, target_modules=["q_proj"])

    merge(make_plan(base, [adapter], dtype=into, shard_bytes=70_000), out)

    got, deltas = read_tensors(out), deltas_of_adapter(adapter)
    assert_within_contract(got, read_tensors(base), deltas, getattr(torch, into))
    config = json.loads((out / "config.json").read_text())
    assert config == {**json.loads((base / "config.json").read_text()), "dtype": into}


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_the_merged_model_answers_like_base_plus_adapter(
    dtype: str, bases: Callable[..., Path], tmp_path: Path, out: Path
) -> None:
    base = bases(dtype, shard="80KB")
    adapter = make_adapter(tmp_path / "adapter", base, lora_alpha=12)
    merge(make_plan(base, [adapter]), out)

    plain, info = load(base), load(out, output_loading_info=True)
    tokens = torch.arange(48).reshape(2, 24)
    with torch.inference_mode():
        alone = plain(tokens).logits
        beside = PeftModel.from_pretrained(plain, adapter)(tokens).logits
        merged = info[0](tokens).logits
    effect = (beside - alone).abs().max()
    assert effect > 0.1
    assert (merged - beside).abs().max() < {"BF16": 0.05, "F32": 1e-5}[dtype] * effect


def load(path: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **options)


@pytest.mark.parametrize("tied", [False, True])
def test_transformers_misses_no_key_and_meets_no_strange_one(
    tied: bool, bases: Callable[..., Path], tmp_path: Path, out: Path
) -> None:
    base = bases("BF16", tie_word_embeddings=tied)
    adapter = make_adapter(tmp_path / "adapter", base)
    merge(make_plan(base, [adapter], shard_bytes=70_000), out)

    _, info = load(out, output_loading_info=True)

    assert not any(info.values()), info


def test_what_the_adapter_does_not_touch_is_carried_byte_for_byte(
    bases: Callable[..., Path], tmp_path: Path, out: Path
) -> None:
    base = bases("F16", shard="80KB")
    adapter = make_adapter(tmp_path / "adapter", base, target_modules=["v_proj"])

    merge(make_plan(base, [adapter]), out)

    before, after = read_tensors(base), read_tensors(out)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"model.layers.{n}.self_attn.v_proj.weight" for n in (0, 1)}


def test_side_files_are_carried_byte_for_byte_and_readable_by_others(
    base_copy: Path, adapter: Path, out: Path
) -> None:
    (base_copy / "vocab.json").write_bytes(b"\xff\x00 not even text")
    (base_copy / "additional_chat_templates").mkdir()
    (base_copy / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    (base_copy / ".gitattributes").write_text("* -text")
    (base_copy / "notes").mkdir()
    (base_copy / "notes" / "log.txt").write_text("kept at home")

    merge(make_plan(base_copy, [adapter], shard_bytes=70_000), out)

    after = published(out)
    weights = [name for name in after if name.endswith(".safetensors")]
    kept = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    kept |= {
        "chat_template.jinja",
        "LICENSE",
        "vocab.json",
        "additional_chat_templates/tools.jinja",
    }
    made = {"model.safetensors.index.json", "README.md", "README.base.md"}
    assert set(after) - set(weights) == kept | made
    assert after["README.base.md"] == (base_copy / "README.md").read_bytes()
    assert all(after[name] == (base_copy / name).read_bytes() for name in kept)
    umask = os.umask(0)
    os.umask(umask)
    assert {stat.S_IMODE((out / name).stat().st_mode) for name in after} == {0o666 & ~umask}
    assert len(weights) == 4
    assert all(re.fullmatch(r"model-0000\d-of-00004.safetensors", name) for name in weights)

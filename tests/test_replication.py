"""Adapters that were trained on copies of layers: each copy becomes a layer of its own.

PEFT lets the copies share their weights and would add the factors of all of them to each, so the
oracle is how base and adapter answer while they run.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import deltas_of_adapter, edit_json, make_adapter, qwen_config, read_tensors
from oracles import assert_within_contract
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from cluster.explain import counts_of
from merge_core.errors import InputError
from merge_core.merge import merge
from merge_core.planner import make_plan
from merge_core.replication import replicated_config
from merge_core.verify import verify

ORDER = [0, 1, 1, 0, 1]
RANGES = [[0, 2], [1, 2], [0, 2]]


@pytest.fixture
def base(bases: Callable[..., Path]) -> Path:
    return bases("F32", shard="80KB")


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(2, 40)[None], use_cache=False).logits


def run_deeper(base: Path, adapter: Path) -> PeftModel:
    model = AutoModelForCausalLM.from_pretrained(base)
    model.config.layer_types = ["full_attention"] * len(ORDER)  # transformers looks copies up there
    return PeftModel.from_pretrained(model, adapter)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"bias": "all", "target_modules": ["q_proj"]},
        {"use_dora": True, "rank_pattern": {"layers.3.*": 4}},
        {"modules_to_save": ["input_layernorm"], "target_modules": ["up_proj"]},
    ],
    ids=["plain", "biases", "DoRA and patterns", "whole modules"],
)
def test_copied_layers_answer_as_base_and_adapter_do(
    base: Path, fields: dict[str, Any], tmp_path: Path, out: Path
) -> None:
    adapter = make_adapter(tmp_path / "adapter", base, layer_replication=RANGES, **fields)

    merge(make_plan(base, [adapter], shard_bytes=70_000), out)

    wanted = logits(run_deeper(base, adapter))
    got = logits(AutoModelForCausalLM.from_pretrained(out))
    assert torch.allclose(got, wanted, rtol=1e-4, atol=1e-4)
    assert verify(out, "numeric").findings == ()
    assert verify(out, "load").findings == ()
    config = json.loads((out / "config.json").read_text())
    assert (config["num_hidden_layers"], len(config["layer_types"])) == (5, 5)


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_each_copy_has_its_own_factors_in_one_rounding(
    dtype: str, bases: Callable[..., Path], tmp_path: Path, out: Path
) -> None:
    base = bases(dtype, shard="80KB")
    fields = {"layer_replication": RANGES, "target_modules": ["q_proj", "down_proj"]}
    adapter = make_adapter(tmp_path / "adapter", base, scale=0.02, **fields)

    merge(make_plan(base, [adapter]), out)

    before, deeper = read_tensors(base), {}
    for name, tensor in before.items():
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        if layer is None:
            deeper[name] = tensor
            continue
        for new in [n for n, old in enumerate(ORDER) if old == int(layer[1])]:
            deeper[re.sub(r"\d+", str(new), name, count=1)] = tensor
    assert_within_contract(read_tensors(out), deeper, deltas_of_adapter(adapter))


def test_the_plan_says_what_is_new_and_what_is_left_out(base: Path, tmp_path: Path) -> None:
    fields = {"layer_replication": [[1, 2], [1, 2], [1, 2]], "target_modules": ["q_proj"]}
    adapter = make_adapter(tmp_path / "adapter", base, **fields)

    plan = make_plan(base, [adapter])

    assert counts_of(plan) == {
        "merged": 3, "replaced": 0, "decoded": 0, "converted": 0, "copied": 36, "added": 12,
    }  # fmt: skip
    assert plan.notes == (
        "layer_replication: 2 layers become 3, each a copy of its own; there is no copy of layer 0",
    )


@pytest.mark.parametrize(
    ("ranges", "said"),
    [
        ([[0, 3]], r"\[0, 3\] are none of the base's 2 layers"),
        ([[1, 1]], r"\[1, 1\] are none of the base's 2 layers"),
        ([[0, 2, 1]], "layer_replication is"),
        ([[0, -1]], "layer_replication is"),
        ("0-2", "layer_replication is"),
        ([[0, 1]], "the base has no"),
    ],
)
def test_ranges_that_fit_no_base_are_refused(
    base: Path, ranges: Any, said: str, tmp_path: Path
) -> None:
    adapter = make_adapter(tmp_path / "adapter", base, layer_replication=RANGES)
    edit_json(adapter / "adapter_config.json", layer_replication=ranges)

    with pytest.raises(InputError, match=said):
        make_plan(base, [adapter])


def test_a_layer_whose_factors_are_missing_is_named(base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", base, layer_replication=RANGES)
    edit_json(adapter / "adapter_config.json", layer_replication=[*RANGES, [0, 1]])

    with pytest.raises(InputError, match=r"covers model\.layers\.5\.self_attn"):
        make_plan(base, [adapter])


def test_adapters_of_different_copies_are_refused(base: Path, tmp_path: Path) -> None:
    deep = make_adapter(tmp_path / "deep", base, layer_replication=RANGES)
    plain = make_adapter(tmp_path / "plain", base)

    with pytest.raises(InputError, match="trained on different copies of layers"):
        make_plan(base, [deep, plain])


def test_adapters_of_the_same_copies_are_summed(base: Path, tmp_path: Path, out: Path) -> None:
    adapters = [
        make_adapter(tmp_path / f"{n}", base, seed=n, layer_replication=RANGES) for n in (1, 2)
    ]

    merge(make_plan(base, [adapters[0], f"{adapters[1]}@-0.5"]), out)

    assert verify(out, "numeric").findings == ()
    saved = [load_file(path / "adapter_model.safetensors") for path in adapters]
    module = "layers.4.self_attn.q_proj"
    a, b = (
        [one[f"base_model.model.model.{module}.lora_{x}.weight"] for one in saved] for x in "AB"
    )
    delta = 2 * (b[0].double() @ a[0].double()) - b[1].double() @ a[1].double()
    exact = read_tensors(base)["model.layers.1.self_attn.q_proj.weight"].double() + delta
    assert torch.allclose(read_tensors(out)[f"model.{module}.weight"].double(), exact, atol=1e-6)


def test_what_follows_from_a_layers_number_is_written_down_for_each_copy() -> None:
    windows = {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": 8}
    dense = qwen_config(num_hidden_layers=2, **windows).to_dict()
    derived = {name: value for name, value in dense.items() if name != "layer_types"}
    types = [("full_attention", "sliding_attention")[old] for old in ORDER]

    for config in (dense, derived):
        expected = {"num_hidden_layers": 5, "layer_types": types}
        assert replicated_config(config, ORDER) == expected

    moe = {"model_type": "qwen2_moe", "num_hidden_layers": 2, "decoder_sparse_step": 2}
    assert replicated_config(moe, ORDER) == {
        "num_hidden_layers": 5,
        "mlp_only_layers": [0, 3],
        "decoder_sparse_step": 1,
    }


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (
            {"layer_types": ["full_attention"]},
            "layer_types in config.json is no list of the base's 2",
        ),
        (
            {"layer_types": "full_attention"},
            "layer_types in config.json is no list of the base's 2",
        ),
        (
            {"use_sliding_window": True, "max_window_layers": "1"},
            "max_window_layers in config.json",
        ),
    ],
    ids=str,
)
def test_what_the_config_says_of_layers_must_be_of_all_of_them(
    base_copy: Path, tmp_path: Path, fields: dict[str, Any], said: str
) -> None:
    adapter = make_adapter(tmp_path / "adapter", base_copy, layer_replication=RANGES)
    edit_json(base_copy / "config.json", **fields)

    with pytest.raises(InputError, match=said):
        make_plan(base_copy, [adapter])


def test_every_layer_has_experts_where_the_config_is_silent() -> None:
    moe = {"model_type": "qwen2_moe", "num_hidden_layers": 2}
    for step in ({}, {"decoder_sparse_step": None}, {"decoder_sparse_step": 0}):
        assert replicated_config(moe | step, ORDER)["mlp_only_layers"] == []

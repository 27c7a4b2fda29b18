"""Adapters as older releases of PEFT wrote them: fewer fields, other keys, pickles.

The fields are those of ``LoraConfig`` in the released packages, the keys those of their
``get_peft_model_state_dict``.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import assert_same_tensors, make_adapter, oracle, read_tensors
from safetensors.torch import load_file, save_file

from merge_core.errors import InputError
from merge_core.merge import merge
from merge_core.planner import make_plan

FIELDS_SINCE = {
    "0.8": (
        "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "fan_in_fan_out",
        "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform",
        "loftq_config", "lora_alpha", "lora_dropout", "megatron_config", "megatron_core",
        "modules_to_save", "peft_type", "r", "rank_pattern", "revision", "target_modules",
        "task_type", "use_rslora",
    ),
    "0.9": ("use_dora",),
    "0.10": ("layer_replication",),
    "0.14": ("eva_config", "exclude_modules", "lora_bias"),
    "0.15": ("corda_config", "trainable_token_indices"),
    "0.16": ("qalora_group_size", "use_qalora"),
    "0.17": ("target_parameters",),
    "0.18": ("alora_invocation_tokens", "arrow_config", "ensure_weight_tying", "peft_version"),
    "0.19": ("lora_ga_config", "use_bdlora"),
    "0.20": ("monteclora_config", "velora_config"),
}  # fmt: skip
"""What each release added; ``runtime_config`` (0.12) was never written."""

RELEASES = [f"0.{minor}" for minor in range(8, 22)]

FEATURES: dict[str, tuple[str, dict[str, Any]]] = {
    "factors": ("0.8", {"r": 4, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 5}}),
    "rank-stabilised": ("0.8", {"use_rslora": True, "lora_alpha": 3}),
    "whole modules": (
        "0.8",
        {"modules_to_save": ["lm_head", "norm"], "target_modules": ["q_proj"]},
    ),
    "every bias": ("0.8", {"bias": "all", "target_modules": ["q_proj"]}),
    "the head": ("0.8", {"target_modules": ["q_proj", "lm_head"]}),
    "DoRA": ("0.9", {"use_dora": True, "target_modules": ["q_proj", "up_proj"]}),
    "a bias on B": ("0.14", {"lora_bias": True, "target_modules": ["k_proj"]}),
    "trained tokens": ("0.15", {"trainable_token_indices": [3, 9], "target_modules": ["q_proj"]}),
}


def number(release: str) -> int:
    return int(release.split(".")[1])


CASES = [
    (release, feature)
    for feature, (since, _) in FEATURES.items()
    for release in RELEASES
    if number(release) >= number(since)
]


Made = Callable[[str], tuple[Path, dict[str, torch.Tensor]]]


@pytest.fixture(scope="module")
def made(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """An adapter of today with a feature, and PEFT's merge of it."""

    @functools.cache
    def make(feature: str) -> tuple[Path, dict[str, torch.Tensor]]:
        path = tmp_path_factory.mktemp("today") / "adapter"
        adapter = make_adapter(path, base, **FEATURES[feature][1])
        return adapter, oracle(base, adapter)

    return make


def as_written_by(release: str, adapter: Path, path: Path) -> Path:
    """The same adapter with the fields of that release; pickled before safetensors were usual."""
    path.mkdir()
    written = json.loads((adapter / "adapter_config.json").read_text())
    fields = [
        name
        for since, names in FIELDS_SINCE.items()
        if number(since) <= number(release)
        for name in names
    ]
    config = {name: written[name] for name in fields if name in written}
    config |= {"peft_version": f"{release}.0"} if "peft_version" in fields else {}
    (path / "adapter_config.json").write_text(json.dumps(config))
    saved = load_file(adapter / "adapter_model.safetensors")
    if number(release) == 8:
        torch.save(saved, path / "adapter_model.bin")
    else:
        save_file(saved, path / "adapter_model.safetensors", metadata={"format": "pt"})
    return path


@pytest.mark.parametrize(("release", "feature"), CASES)
def test_what_a_release_wrote_is_merged_as_todays(
    release: str, feature: str, made: Made, base: Path, tmp_path: Path
) -> None:
    adapter, wanted = made(feature)

    merge(make_plan(base, [as_written_by(release, adapter, tmp_path / "old")]), tmp_path / "out")

    assert_same_tensors(read_tensors(tmp_path / "out"), wanted)


RENAMED: dict[str, tuple[dict[str, Any], Callable[[str], str]]] = {
    "modules_to_save, the adapter's name": (
        {"modules_to_save": ["lm_head", "norm"]},
        lambda key: (
            key.replace(".weight", ".modules_to_save.default.weight") if "lora" not in key else key
        ),
    ),
    "modules_to_save": (
        {"modules_to_save": ["lm_head", "norm"]},
        lambda key: key.replace(".weight", ".modules_to_save.weight") if "lora" not in key else key,
    ),
    "biases without base_layer": (
        {"bias": "lora_only", "target_modules": ["q_proj"]},
        lambda key: key.replace(".base_layer.bias", ".bias"),
    ),
    "a head without base_layer": (
        {"target_modules": ["q_proj", "lm_head"]},
        lambda key: key.replace(".base_layer.weight", ".weight"),
    ),
    "magnitudes with weight": (
        {"use_dora": True, "target_modules": ["q_proj"]},
        lambda key: key.replace("magnitude_vector", "magnitude_vector.weight"),
    ),
}


@pytest.mark.parametrize("layout", RENAMED)
def test_older_names_of_keys_mean_the_same(layout: str, base: Path, tmp_path: Path) -> None:
    fields, rename = RENAMED[layout]
    adapter = make_adapter(tmp_path / "adapter", base, **fields)
    wanted, file = oracle(base, adapter), adapter / "adapter_model.safetensors"
    saved = load_file(file)
    renamed = {rename(key): tensor for key, tensor in saved.items()}
    assert renamed.keys() != saved.keys()
    save_file(renamed, file)

    merge(make_plan(base, [adapter]), tmp_path / "out")

    assert_same_tensors(read_tensors(tmp_path / "out"), wanted)


def test_biases_that_a_release_forgot_to_save_are_missed(base: Path, tmp_path: Path) -> None:
    """PEFT looked for ``q_proj.bias`` where its own layers had ``q_proj.base_layer.bias``."""
    fields = {"bias": "lora_only", "target_modules": ["q_proj"]}
    adapter = make_adapter(tmp_path / "adapter", base, **fields)
    file = adapter / "adapter_model.safetensors"
    save_file({k: t for k, t in load_file(file).items() if not k.endswith(".bias")}, file)

    with pytest.raises(InputError, match=r"bias=lora_only covers model\.layers\.0\.self_attn"):
        make_plan(base, [adapter])

"""What a config says was trained is found to be missing, however it says it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from models import edit_json, make_adapter
from peft import LoraConfig
from peft.tuners.tuners_utils import _ExcludedModule, check_target_module_exists
from safetensors.torch import load_file, save_file

from merge_core.errors import InputError
from merge_core.planner import make_plan
from merge_core.targets import read_targets

LAYER = "model.layers.{}.self_attn.q_proj"
MODULES = [
    *(LAYER.format(n) for n in (0, 1, 10)),
    "model.layers.1.mlp.up_proj",
    "model.layers.0.mlp.down_proj",
    "model.embed_tokens",
    "lm_head",
    "transformer.h.1.attn.q_proj",
]
SAID: dict[str, dict[str, Any]] = {
    "ends of paths": {"target_modules": ["q_proj", "lm_head"]},
    "a regex": {"target_modules": r".*\.(q|up)_proj"},
    "a layer": {"target_modules": ["q_proj", "lm_head"], "layers_to_transform": 1},
    "the first layer": {"target_modules": ["q_proj"], "layers_to_transform": 0},
    "layers": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [0, 10]},
    "no layers": {"target_modules": ["q_proj"], "layers_to_transform": []},
    "layers by name": {
        "target_modules": ["q_proj"],
        "layers_to_transform": [1],
        "layers_pattern": "layers",
    },
    "layers by names": {
        "target_modules": ["q_proj"],
        "layers_to_transform": [1],
        "layers_pattern": ["blocks", "h"],
    },
    "whole paths in no layer": {
        "target_modules": ["lm_head", LAYER.format(0)],
        "layers_to_transform": [1],
    },
    "all but some": {"target_modules": ["q_proj", "up_proj"], "exclude_modules": ["up_proj"]},
    "all but a regex": {"target_modules": ["q_proj"], "exclude_modules": r".*layers\.1\..*"},
}


@pytest.mark.parametrize("story", SAID)
def test_modules_are_targets_where_peft_says_so(story: str) -> None:
    fields = SAID[story]
    config, targets = LoraConfig(**fields), read_targets(fields)

    for module in MODULES:
        found = check_target_module_exists(config, module)
        wanted = bool(found) and not isinstance(found, _ExcludedModule)
        assert targets.covers(module) == wanted, module
    assert any(map(targets.covers, MODULES))


@pytest.mark.parametrize(
    "fields",
    [
        {"layers_to_transform": [1]},
        {"layers_to_transform": [1], "layers_pattern": "layers"},
        {"exclude_modules": ["down_proj"]},
    ],
    ids=str,
)
def test_a_missing_module_is_named_where_targets_are_narrowed_down(
    base: Path, fields: dict[str, Any], tmp_path: Path
) -> None:
    adapter = make_adapter(tmp_path / "adapter", base, **fields)
    make_plan(base, [adapter])
    file, lost = adapter / "adapter_model.safetensors", "model.layers.1.mlp.up_proj"
    save_file({k: t for k, t in load_file(file).items() if lost not in k}, file)

    with pytest.raises(InputError, match=f"target_modules covers {re.escape(lost)}"):
        make_plan(base, [adapter])


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"target_modules": "(.*)+_proj"}, "target_modules"),
        ({"target_modules": r"\1q_proj"}, "target_modules"),
        ({"exclude_modules": "(.*)+x"}, "exclude_modules"),
        ({"layers_to_transform": ["1"]}, "layers_to_transform"),
        ({"layers_to_transform": [1], "layers_pattern": r"\1"}, "layers_pattern"),
    ],
    ids=str,
)
def test_what_cannot_be_followed_is_told(
    base: Path, fields: dict[str, Any], field: str, tmp_path: Path
) -> None:
    adapter = make_adapter(tmp_path / "adapter", base)
    edit_json(adapter / "adapter_config.json", **fields)

    (note,) = make_plan(base, [adapter]).notes

    assert note.startswith(f"{adapter}: {field} is nothing that can be followed")


def test_experts_are_no_targets_where_layers_are_chosen() -> None:
    """Older releases of PEFT took the number of the expert for that of the layer."""
    targets = read_targets({"target_modules": ["up_proj"], "layers_to_transform": [1]})

    assert not targets.covers("model.layers.1.mlp.experts.1.up_proj")
    assert targets.covers("model.layers.1.mlp.shared_expert.up_proj")

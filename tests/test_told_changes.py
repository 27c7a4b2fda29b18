"""Plan and result say which fields of config.json the merge changes, and what follows from it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from handmade import TWO_LANES
from models import make_adapter

from cluster import console
from merge_core.merge import merge
from merge_core.planner import make_plan

FULL = '"full_attention"'
CHANGES: dict[str, tuple[dict[str, Any], str, str]] = {
    "untied": (
        {"target_modules": ["lm_head"]},
        "config   tie_word_embeddings true -> false",
        "embeddings and head are untied",
    ),
    "a vocabulary of more tokens": (
        {"target_modules": ["q_proj"], "vocabulary": 170},
        "config   vocab_size 160 -> 170",
        "the tokenizer's files are the base's own",
    ),
    "copied layers": (
        {"target_modules": ["q_proj"], "layer_replication": [[0, 2], [0, 2]]},
        f"config   num_hidden_layers 2 -> 4, layer_types [{FULL}, {FULL}] -> [{FULL}, {FULL}, ...",
        "layer_replication: 2 layers become 4",
    ),
}


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied")
@pytest.mark.parametrize("story", CHANGES)
def test_plan_and_result_say_what_changes_in_the_config(
    bases: Callable[..., Path], story: str, tmp_path: Path, out: Path
) -> None:
    fields, line, note = CHANGES[story]
    base = bases("F32", shard="80KB", tie_word_embeddings=True)
    plan = make_plan(base, [make_adapter(tmp_path / "adapter", base, **fields)])

    result = merge(plan, out, choice=TWO_LANES)

    for lines in (console.plan_lines(plan, []), console.result_lines(result, plan)):
        assert line in lines
        assert any(one.startswith("note     ") and note in one for one in lines)
    for document in (console.plan_document(plan, []), console.result_document(result, plan)):
        assert any(note in one for one in document["notes"])
        changes = document["config_changes"]
        assert changes.keys() == dict(plan.config_changes).keys()
        assert all(change["from"] != change["to"] for change in changes.values())


def test_fields_that_are_removed_are_told(bases: Callable[..., Path], adapter: Path) -> None:
    plan = dataclasses.replace(
        make_plan(bases("BF16", shard="40KB"), [adapter]),
        config={"quantization_config": {"bits": 4}},
        config_changes={"quantization_config": None, "torch_dtype": "bfloat16"},
    )

    assert 'config   quantization_config removed, torch_dtype "bfloat16"' in console.plan_lines(
        plan, []
    )

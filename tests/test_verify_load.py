"""Level ``load`` holds a checkpoint against its model class, and runs no code of it."""

from __future__ import annotations

from pathlib import Path

import torch
from merged_by_hand import GATE, Q0, found, write_out
from models import edit_json
from oracles import Tensors
from safetensors.torch import load_file
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

from merge_core.verify import verify


def test_load_names_what_the_model_class_misses(
    base: Path, adapter: Path, wanted: Tensors, tmp_path: Path
) -> None:
    tensors = {**wanted, "model.more": torch.ones(2), GATE: wanted[GATE][:-1]}
    del tensors[Q0]
    out = write_out(tmp_path / "out", tensors, base=base, adapters={adapter: 1.0})

    report = verify(out, "load")

    assert [(f.check, f.where, f.what) for f in report.findings] == [
        ("load", Q0, "the model needs it, the checkpoint has not got it"),
        ("load", "model.more", "the model has no place for it"),
        ("load", GATE, "its shape is [95, 64], the model's is [96, 64]"),
    ]


def test_load_respects_fused_experts(tmp_path: Path) -> None:
    """Checkpoints hold an expert's three matrices, transformers 5 holds one tensor for all."""
    config = Qwen2MoeConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=24,
        moe_intermediate_size=8,
        shared_expert_intermediate_size=16,
        num_experts=3,
        vocab_size=32,
    )
    base = tmp_path / "base"
    Qwen2MoeForCausalLM(config).save_pretrained(base)
    tensors = load_file(base / "model.safetensors")
    assert "model.layers.0.mlp.experts.2.up_proj.weight" in tensors
    out = write_out(tmp_path / "out", tensors, base=base, adapters={}, files=1)

    assert found(out, "load") == []

    del tensors["model.layers.0.mlp.experts.2.up_proj.weight"]
    out = write_out(tmp_path / "out", tensors, base=base, adapters={}, files=1)
    assert [check for check, _ in found(out, "load")] == ["load"]


def test_load_runs_no_code_of_the_checkpoint(finished: Path) -> None:
    (finished / "mine.py").write_text("raise SystemExit('code of the checkpoint ran')")
    edit_json(finished / "config.json", auto_map={"AutoModelForCausalLM": "mine.Model"})
    assert found(finished, "load") == []

    edit_json(finished / "config.json", model_type="mine", auto_map={"AutoConfig": "mine.Config"})
    assert found(finished, "load") == [("load", "config.json")]

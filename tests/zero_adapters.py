"""Adapters full of zeros, for tests of what their config, names and shapes say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from merged_by_hand import write_json, write_weights
from peft import LoraConfig

Q, UP = "model.layers.1.self_attn.q_proj", "model.layers.11.mlp.up_proj"
BASE = {f"{Q}.weight": (6, 6), f"{UP}.weight": (10, 6), "model.norm.weight": (6,)}


def write_adapter(
    path: Path,
    ranks: dict[str, int],
    shapes: dict[str, tuple[int, int]] | None = None,
    **fields: Any,
) -> Path:
    """Factors for the modules of ``ranks``, with B @ A of the base's shape or of ``shapes``."""
    path.mkdir(exist_ok=True)
    config = json.loads(json.dumps(LoraConfig().to_dict(), default=str))
    write_json(path / "adapter_config.json", {**config, "peft_type": "LORA", **fields})
    tensors = {}
    for module, rank in ranks.items():
        out, into = {**BASE, **(shapes or {})}[f"{module}.weight"]
        tensors[f"base_model.model.{module}.lora_A.weight"] = torch.zeros(rank, into)
        tensors[f"base_model.model.{module}.lora_B.weight"] = torch.zeros(out, rank)
    write_weights(path / "adapter_model.safetensors", tensors)
    return path

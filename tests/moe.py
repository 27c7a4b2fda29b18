"""Small Qwen1.5-MoE checkpoints and adapters on them, and what their merge must give."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from handmade import random_factors, write_adapter
from models import read_tensors
from oracles import Delta, Tensors
from peft.utils.save_and_load import load_peft_weights
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

from merge_core.merge import merge
from merge_core.planner import make_plan
from merge_core.verify import verify

HIDDEN, INNER, SHARED, EXPERTS = 64, 48, 80, 4
DENSE_LAYER = 1
"""The one of three layers that has no experts."""
PREFIX = "base_model.model."
LAYERS_OF = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
BOTH = ["experts.gate_up_proj", "experts.down_proj"]


def make_moe(
    path: Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    fused: bool = False,
    shard: str = "80KB",
    inner: int = INNER,
) -> Path:
    """A checkpoint with a tensor for each expert, or with all of a layer in one."""
    torch.manual_seed(0)
    config = Qwen2MoeConfig(
        hidden_size=HIDDEN,
        intermediate_size=96,
        moe_intermediate_size=inner,
        shared_expert_intermediate_size=SHARED,
        num_experts=EXPERTS,
        num_experts_per_tok=2,
        num_hidden_layers=3,
        mlp_only_layers=[DENSE_LAYER],
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=160,
        max_position_embeddings=128,
        tie_word_embeddings=False,
    )
    model = Qwen2MoeForCausalLM(config).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bias" in name or ".gate." in name:
                parameter.normal_(std=0.1)
    model.save_pretrained(path, max_shard_size=shard, save_original_format=not fused)
    return path


def module_shapes(base: Path) -> dict[str, tuple[int, int]]:
    """Shape of each linear module as older transformers had them, each expert apart."""
    shapes: dict[str, tuple[int, int]] = {}
    for name, tensor in read_tensors(base).items():
        if tensor.dim() == 2 and "embed" not in name:
            shapes[name.removesuffix(".weight")] = (tensor.shape[0], tensor.shape[1])
    return shapes


def write_expert_adapter(
    path: Path, base: Path, targets: list[str], *, rank: int = 4, **config: Any
) -> Path:
    """An adapter as PEFT wrote it with older transformers: factors for each expert's layers.

    Args:
        base: with a tensor for each expert.
    """
    modules = [m for m in module_shapes(base) if m.rpartition(".")[2] in targets]
    pattern = config.get("rank_pattern", {})
    ranks = {m: next((r for end, r in pattern.items() if m.endswith(end)), rank) for m in modules}
    factors = random_factors(module_shapes(base), ranks)
    return write_adapter(path, factors, r=rank, target_modules=targets, **config)


def write_fused_adapter(path: Path, base: Path, *, swapped: bool, **config: Any) -> Path:
    """An adapter on both parameters by hand, with its products [out, in], or [in, out]."""
    shapes = {}
    for module, (out, width) in module_shapes(base).items():
        layer = module.rpartition(".")[2]
        if ".experts.0." in module and layer != "gate_proj":
            where = module.partition(".experts")[0] + ".experts"
            where += ".base_layer" if layer == "up_proj" else ""
            shape = (2 * out if layer == "up_proj" else out, width)
            shapes[where] = shape[::-1] if swapped else shape
    factors = random_factors(shapes, dict.fromkeys(shapes, 3 * EXPERTS))
    fields = {"r": 3, "lora_alpha": 5, "target_parameters": BOTH, **config}
    return write_adapter(path, factors, **fields)


def expert_deltas(adapter: Path, base: Path, *, swapped: bool = False) -> dict[str, list[Delta]]:
    """The deltas of an adapter on parameters, for a base with a tensor for each expert.

    Written down once more from PEFT's ``lora.ParamWrapper``: the factors of all experts are
    reshaped, and the patterns are matched with the parameter's path. The product of an expert's
    factors is [out, in], and [in, out] in what PEFT saved before 0.19 (``swapped``).
    """
    config = json.loads((adapter / "adapter_config.json").read_text())
    saved = load_peft_weights(str(adapter), device="cpu")
    shapes, found = module_shapes(base), dict[str, list[Delta]]()
    for key in saved:
        if not key.endswith(".lora_A.weight"):
            continue
        path = key.removeprefix(PREFIX).removesuffix(".lora_A.weight")
        a, b = saved[key], saved[key.replace("lora_A", "lora_B")]
        if ".experts" not in path:
            scaling = config["lora_alpha"] / len(a)
            found[f"{path}.weight"] = [Delta(a=a, b=b, scaling=scaling)]
            continue
        names = [n for n in LAYERS_OF if any(t.endswith(n) for t in config["target_parameters"])]
        parameter = names[-1 - path.count(".base_layer")]
        rank = len(a) // EXPERTS
        alpha = config["lora_alpha"]
        for pattern, value in (config.get("alpha_pattern") or {}).items():
            if parameter in pattern:
                alpha = value
        module = path.replace(".base_layer", "")
        a, b = a.reshape(EXPERTS, rank, -1), b.reshape(b.shape[0], rank, EXPERTS)
        for expert in range(EXPERTS):
            top = 0
            for layer in LAYERS_OF[parameter]:
                name = f"{module}.{expert}.{layer}"
                rows, _ = shapes[name]
                left, right = b[:, :, expert], a[expert]
                if swapped:
                    left, right = right.T, left.T
                delta = Delta(a=right, b=left[top : top + rows], scaling=alpha / rank)
                found[f"{name}.weight"] = [delta]
                top += rows
    return found


def apart(tensors: Mapping[str, torch.Tensor]) -> Tensors:
    """Tensors of a fused checkpoint as those of one with a tensor for each expert."""
    found: Tensors = {}
    for name, tensor in tensors.items():
        module, _, parameter = name.rpartition(".")
        layers = LAYERS_OF.get(parameter)
        if layers is None:
            found[name] = tensor
            continue
        for expert, weights in enumerate(tensor):
            for layer, weight in zip(layers, weights.chunk(len(layers)), strict=True):
                found[f"{module}.{expert}.{layer}.weight"] = weight.contiguous()
    return found


def merged(base: Path, adapters: Path | list[str], out: Path, **options: Any) -> Tensors:
    """The tensors of a merge that is verified, those of each expert apart."""
    named = adapters if isinstance(adapters, list) else [str(adapters)]
    merge(make_plan(base, named, shard_bytes=60_000, **options), out)
    assert len(list(out.glob("*.safetensors"))) > 1
    assert verify(out, "numeric").findings == ()
    return apart(read_tensors(out))

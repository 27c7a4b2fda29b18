"""Qwen1.5-shaped checkpoints and adapters with random values, for measuring; no hub needed.

    python benchmarks/checkpoints.py 4B /data/base /data/adapter

Shapes are those that each model's config.json publishes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from merge_core.architecture import expected_tensors
from merge_core.layout import tensor_bytes

# hidden, layers, heads, key-value heads, intermediate, vocabulary, tied
FAMILY = {
    "0.5B": (1024, 24, 16, 16, 2816, 151936, True),
    "1.8B": (2048, 24, 16, 16, 5504, 151936, False),
    "4B": (2560, 40, 20, 20, 6912, 151936, False),
    "7B": (4096, 32, 32, 32, 11008, 151936, False),
    "14B": (5120, 40, 40, 40, 13696, 152064, False),
    "32B": (5120, 64, 40, 8, 27392, 152064, False),
    "72B": (8192, 80, 64, 64, 24576, 152064, False),
    "110B": (8192, 80, 64, 8, 49152, 152064, False),
    "MoE": (2048, 7, 16, 16, 5632, 151936, False),  # of Qwen1.5-MoE's 24 layers: 9.5 of 28.6 GB
}
EXPERTS = {"MoE": (60, 1408, 5632)}
"""Experts of a layer, the inner size of each, and that of the one that they share."""
FILE_BYTES = 4_000_000_000  # the hub's files of this family are about this large
POOL_BYTES = 64 << 20  # random values are drawn once and reused at shifting places


def config(model: str) -> dict[str, object]:
    hidden, layers, heads, kv_heads, inner, vocab, tied = FAMILY[model]
    dense = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "torch_dtype": "bfloat16",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": inner,
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
    }
    if model not in EXPERTS:
        return dense
    experts, expert, shared = EXPERTS[model]
    return {
        **dense,
        "architectures": ["Qwen2MoeForCausalLM"],
        "model_type": "qwen2_moe",
        "num_experts": experts,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": expert,
        "shared_expert_intermediate_size": shared,
        "decoder_sparse_step": 1,
    }


def make_checkpoint(shapes: Mapping[str, object], path: Path, *, hollow: bool = False) -> None:
    """Write the base as the hub's files are: 8-byte aligned headers, some 4 GB each.

    Args:
        shapes: its ``config``.
        hollow: headers alone, and holes for the values: enough to plan with, in no space.
    """
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(shapes, indent=2))
    tensors = {name: ("BF16", shape) for name, shape in expected_tensors(shapes)}
    files: list[dict[str, tuple[str, tuple[int, ...]]]] = [{}]
    for name, (dtype, shape) in tensors.items():
        size = sum(tensor_bytes(*spec) for spec in files[-1].values())
        if files[-1] and size + tensor_bytes(dtype, shape) > FILE_BYTES:
            files.append({})
        files[-1][name] = (dtype, shape)
    pool = None if hollow else _pool_of_bfloat16(0.02, POOL_BYTES)
    weight_map: dict[str, str] = {}
    for number, content in enumerate(files, 1):
        name = f"model-{number:05}-of-{len(files):05}.safetensors"
        _write(path / name, dict(sorted(content.items())), pool)
        weight_map |= dict.fromkeys(content, name)
    total = sum(tensor_bytes(*spec) for spec in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True))


def make_adapter(
    shapes: Mapping[str, object],
    path: Path,
    targets: str = "all",
    *,
    rank: int = 16,
    hollow: bool = False,
) -> None:
    """Write a float32 LoRA adapter on ``targets``: ``all`` linear layers, ``qv``, or ``dora``,
    which is all of them but experts, with magnitudes.

    Of experts it holds what PEFT trains with transformers 5: the parameters that all of a layer's
    share.
    """
    path.mkdir(parents=True)
    ends = ("q_proj.weight", "v_proj.weight") if targets == "qv" else ("_proj.weight",)
    content: dict[str, tuple[str, tuple[int, ...]]] = {}
    parameters: set[str] = set()
    for name, shape in expected_tensors(shapes, fused=True):
        module, inner = f"base_model.model.{name.removesuffix('.weight')}", rank
        if len(shape) == 3 and targets == "all":
            module, _, parameter = module.rpartition(".")
            module += ".base_layer" * (parameter == "gate_up_proj")
            parameters.add(f"experts.{parameter}")
            inner *= shape[0]
        elif not name.endswith(ends) or len(shape) == 3:
            continue
        elif targets == "dora":
            content[f"{module}.lora_magnitude_vector"] = ("F32", shape[:1])
        content[f"{module}.lora_A.weight"] = ("F32", (inner, shape[-1]))
        content[f"{module}.lora_B.weight"] = ("F32", (shape[-2], inner))
    draw = np.random.default_rng(1).normal
    pool = None if hollow else draw(0, 0.01, POOL_BYTES // 4).astype("<f4")
    _write(path / "adapter_model.safetensors", content, pool)
    fields = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": 2 * rank,
        "use_dora": targets == "dora",
        "target_modules": sorted({n.split(".")[-3] for n in content if "_proj.lora_A." in n}),
        "target_parameters": sorted(parameters),
        "peft_version": "0.21.0",
        "base_model_name_or_path": None,
        "bias": "none",
        "inference_mode": True,
    }
    (path / "adapter_config.json").write_text(json.dumps(fields, indent=2))


def _pool_of_bfloat16(scale: float, nbytes: int) -> np.ndarray:
    values = np.random.default_rng(0).normal(0, scale, nbytes // 2).astype("<f4")
    return (values.view("<u4") >> 16).astype("<u2")


def _write(
    path: Path, content: Mapping[str, tuple[str, tuple[int, ...]]], pool: np.ndarray | None
) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in content.items():
        size = tensor_bytes(dtype, shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        if pool is None:
            file.truncate(file.tell() + end)
            return
        for run in _runs(end // pool.itemsize, len(pool)):
            pool[run].tofile(file)


def _runs(elements: int, pool: int) -> Iterator[slice]:
    """Slices of the pool that together hold that many elements, each from another place."""
    done, place = 0, 0
    while done < elements:
        run = slice(place, min(pool, place + elements - done))
        yield run
        done += run.stop - run.start
        place = (place * 31 + 7919) % (pool // 2)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=FAMILY)
    parser.add_argument("base", type=Path)
    parser.add_argument("adapter", type=Path)
    parser.add_argument("--targets", choices=("all", "qv", "dora"), default="all")
    options = parser.parse_args()
    make_checkpoint(config(options.model), options.base)
    make_adapter(config(options.model), options.adapter, options.targets)

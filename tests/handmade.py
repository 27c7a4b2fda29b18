"""Checkpoints and adapters written by hand, without transformers and PEFT: any shape, at once."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from oracles import Delta, Tensors
from safetensors.torch import save_file

from merge_core.memory import LaneChoice
from merge_core.plan import MergePlan
from merge_core.planner import make_plan

INDEX = "model.safetensors.index.json"
TWO_LANES = LaneChoice(lanes=2, read_bytes=1 << 20, reason="the test says so")
FOUR_LANES = LaneChoice(lanes=4, read_bytes=1 << 20, reason="the test says so")


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """The sizes of a dense Qwen1.5 model."""

    hidden: int = 32
    inner: int = 48
    heads: int = 4
    kv_heads: int = 2
    layers: int = 2
    vocab: int = 80
    tied: bool = False

    @property
    def linear(self) -> dict[str, tuple[int, int]]:
        """Shape of each linear module by its path, lm_head apart."""
        keys = self.hidden // self.heads * self.kv_heads
        each = {
            "self_attn.q_proj": (self.hidden, self.hidden),
            "self_attn.k_proj": (keys, self.hidden),
            "self_attn.v_proj": (keys, self.hidden),
            "self_attn.o_proj": (self.hidden, self.hidden),
            "mlp.gate_proj": (self.inner, self.hidden),
            "mlp.up_proj": (self.inner, self.hidden),
            "mlp.down_proj": (self.hidden, self.inner),
        }
        return {
            f"model.layers.{n}.{name}": shape
            for n in range(self.layers)
            for name, shape in each.items()
        }

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of the checkpoint."""
        shapes: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (self.vocab, self.hidden)
        }
        for module, shape in self.linear.items():
            shapes[f"{module}.weight"] = shape
            if module[-6:] in ("q_proj", "k_proj", "v_proj"):
                shapes[f"{module}.bias"] = shape[:1]
        for n in range(self.layers):
            for norm in ("input_layernorm", "post_attention_layernorm"):
                shapes[f"model.layers.{n}.{norm}.weight"] = (self.hidden,)
        shapes["model.norm.weight"] = (self.hidden,)
        if not self.tied:
            shapes["lm_head.weight"] = (self.vocab, self.hidden)
        return shapes

    @property
    def config(self) -> dict[str, Any]:
        """config.json."""
        return {
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "qwen2",
            "hidden_size": self.hidden,
            "intermediate_size": self.inner,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "num_hidden_layers": self.layers,
            "vocab_size": self.vocab,
            "tie_word_embeddings": self.tied,
            "torch_dtype": "bfloat16",
        }


def random_tensors(
    geometry: Geometry, dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator).mul_(0.02).to(dtype)
        for name, shape in geometry.shapes.items()
    }


def write_base(path: Path, tensors: Tensors, config: Mapping[str, Any], files: int = 1) -> Path:
    """A checkpoint whose tensors are dealt out over ``files``."""
    path.mkdir(parents=True)
    write_json(path / "config.json", config)
    (path / "tokenizer.json").write_text('{"version": "1.0"}')
    names = sorted(tensors)
    dealt = [names[n::files] for n in range(files)]
    homes = {}
    for n, held in enumerate(dealt, 1):
        file = "model.safetensors" if files == 1 else f"model-{n:05}-of-{files:05}.safetensors"
        save_file({name: tensors[name] for name in held}, path / file, {"format": "pt"})
        homes |= dict.fromkeys(held, file)
    if files > 1:
        write_json(path / INDEX, {"metadata": {}, "weight_map": homes})
    return path


def random_factors(
    shapes: Mapping[str, tuple[int, int]],
    ranks: Mapping[str, int],
    dtype: torch.dtype = torch.float32,
    seed: int = 1,
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """A and B of each module in ``ranks``; their products are small against the base, as trained
    ones are."""
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for module, rank in ranks.items():
        rows, width = shapes[module]
        a = torch.randn(rank, width, generator=generator).mul_(0.03).to(dtype)
        b = torch.randn(rows, rank, generator=generator).mul_(0.03).to(dtype)
        factors[module] = (a, b)
    return factors


def write_adapter(
    path: Path, factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]], **config: Any
) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    save_file(keyed(factors), path / "adapter_model.safetensors")
    write_json(path / "adapter_config.json", {"peft_type": "LORA", **config})
    return path


def keyed(factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> Tensors:
    """Factors under the names that PEFT saves them with."""
    return {
        f"base_model.model.{module}.lora_{side}.weight": tensor
        for module, pair in factors.items()
        for side, tensor in zip("AB", pair, strict=True)
    }


def deltas_of(
    factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]], scaling: float
) -> dict[str, list[Delta]]:
    """The deltas of an adapter without patterns."""
    return {
        f"{module}.weight": [Delta(a=a, b=b, scaling=scaling)] for module, (a, b) in factors.items()
    }


GEOMETRY = Geometry()
FACTORS = random_factors(GEOMETRY.linear, dict.fromkeys(GEOMETRY.linear, 4))
"""What ``small_merge`` merges: an adapter of rank 4 on every linear layer."""


def small_merge(
    path: Path,
    tensors: Tensors | None = None,
    factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]] | None = None,
    **options: Any,
) -> MergePlan:
    """A base and an adapter below ``path``, planned in several shards, not sealed."""
    base = write_base(path / "base", tensors or random_tensors(GEOMETRY), GEOMETRY.config)
    adapter = write_adapter(path / "adapter", factors or FACTORS, r=4, lora_alpha=8)
    return make_plan(base, [adapter], shard_bytes=18_000, **options)


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content))


def write_raw(path: Path, header: bytes, data: bytes = b"") -> Path:
    """A safetensors file with exactly this header, whatever it says."""
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)
    return path


def header_of(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return dict(json.loads(file.read(int.from_bytes(file.read(8), "little"))))


def rewrite_header(path: Path, header: Mapping[str, Any] | bytes) -> None:
    """Put another header before the data of a safetensors file."""
    content = path.read_bytes()
    data = content[8 + int.from_bytes(content[:8], "little") :]
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    write_raw(path, text, data)


def files_below(path: Path) -> dict[str, bytes]:
    """Content of every file below ``path``, by relative name."""
    return {
        str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()
    }


def published(out: Path) -> dict[str, bytes]:
    """What a merge published in ``out``: everything but raymeld's own record."""
    return {n: data for n, data in files_below(out).items() if not n.startswith(".raymeld")}


def assert_no_checkpoint(out: Path) -> None:
    """Nothing in ``out`` loads, and no worker's unfinished file is left."""
    assert not (out / "config.json").exists()
    assert not list(out.glob(".raymeld/parts/*"))


def ignore_progress(done: int) -> None:
    """For a ``watch`` that watches nothing."""

"""Any combination of what a LoRA adapter can hold merges into any checkpoint.

Written by hand, since making a model for PEFT takes longer than the merge; what these adapters mean
is written down once more in ``expected``, which PEFT confirms on some of them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from handmade import Geometry, random_factors, random_tensors, write_base
from hypothesis import given, settings
from hypothesis import strategies as st
from models import DTYPES, assert_same_tensors, oracle, read_tensors
from oracles import Tensors
from peft.utils.other import get_pattern_key
from safetensors.torch import save_file

from merge_core.memory import LaneChoice
from merge_core.merge import merge
from merge_core.planner import make_plan
from merge_core.verify import verify

EMBED, HEAD = "model.embed_tokens", "lm_head"
PREFIX = "base_model.model."
WITH_BIAS = ("q_proj", "k_proj", "v_proj")


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """An adapter, as its config and its tensors without PEFT's prefix."""

    config: dict[str, Any]
    tensors: Tensors = field(repr=False)

    def write(self, path: Path) -> Path:
        path.mkdir()
        (path / "adapter_config.json").write_text(json.dumps(self.config))
        saved = {f"{PREFIX}{name}": tensor for name, tensor in self.tensors.items()}
        save_file(saved, path / "adapter_model.safetensors")
        return path


@st.composite
def geometries(draw: st.DrawFn) -> Geometry:
    heads = draw(st.sampled_from([1, 2, 4]))
    return Geometry(
        hidden=heads * draw(st.sampled_from([4, 6, 16])),
        inner=draw(st.integers(3, 90)),
        heads=heads,
        kv_heads=draw(st.sampled_from([n for n in (1, 2, 4) if heads % n == 0])),
        layers=draw(st.integers(1, 2)),
        vocab=draw(st.integers(3, 70)),
        tied=draw(st.booleans()),
    )


def noise(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.05


@st.composite
def adapters(draw: st.DrawFn, geometry: Geometry) -> Drawn:
    """What may stand together in one adapter: rows and whole embeddings exclude each other."""
    linear = sorted(geometry.linear)
    lora_bias = draw(st.booleans()) and draw(st.booleans())
    allowed = [m for m in linear if m.endswith(WITH_BIAS)] if lora_bias else linear
    targets = draw(st.lists(st.sampled_from(allowed), min_size=1, unique=True))
    dora = draw(st.booleans())
    kinds = ["none", "tokens", "head", "both", "resized", *["LoRA"] * (not lora_bias)]
    ends = draw(st.sampled_from(kinds))
    shapes = dict(geometry.linear)
    rank, pattern = (
        draw(st.integers(1, 5)),
        draw(st.sampled_from([{}, {"q_proj": 3}, {"mlp.*": 2}])),
    )
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": draw(st.integers(1, 9) | st.just(2.7)),
        "use_rslora": draw(st.booleans()),
        "rank_pattern": pattern,
        "target_modules": [*targets, EMBED] if ends == "LoRA" else targets,
        "use_dora": dora,
        "lora_bias": lora_bias,
        "bias": draw(st.sampled_from(["none", "none", "all", "lora_only"])),
    }
    ranks = {m: pattern.get(get_pattern_key(pattern, m), rank) for m in targets}
    tensors: Tensors = {}
    for module, (a, b) in random_factors(shapes, ranks, seed=draw(st.integers(0, 99))).items():
        tensors |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
        if dora:
            tensors[f"{module}.lora_magnitude_vector"] = noise(len(tensors), len(b)).abs() + 0.1
        if lora_bias:
            tensors[f"{module}.lora_B.bias"] = noise(len(tensors), len(b))
    tensors |= trained_biases(geometry, targets, config["bias"])
    tensors |= trained_ends(geometry, ends, config)
    if draw(st.booleans()):
        config["modules_to_save"] = [*config.get("modules_to_save", []), "input_layernorm"]
        for layer in range(geometry.layers):
            name = f"model.layers.{layer}.input_layernorm.weight"
            tensors[name] = noise(layer, geometry.hidden)
    return Drawn(config=config, tensors=tensors)


def trained_biases(geometry: Geometry, targets: list[str], which: str) -> Tensors:
    biases: Tensors = {}
    for seed, (module, shape) in enumerate(geometry.linear.items()):
        if module.endswith(WITH_BIAS) and (which == "all" or module in targets):
            infix = ".base_layer" if module in targets else ""
            if which != "none":
                biases[f"{module}{infix}.bias"] = noise(seed, shape[0])
    return biases


def trained_ends(geometry: Geometry, ends: str, config: dict[str, Any]) -> Tensors:
    """What was trained of embeddings and head; fills in the config's part of it."""
    vocab, hidden, rank = geometry.vocab, geometry.hidden, config["r"]
    if ends == "LoRA":
        a, b = noise(1, rank, vocab), noise(2, hidden, rank)
        made = {f"{EMBED}.lora_embedding_A": a, f"{EMBED}.lora_embedding_B": b}
        return made | (
            {f"{EMBED}.lora_magnitude_vector": noise(3, hidden).abs() + 0.2}
            if config["use_dora"]
            else {}
        )
    if ends == "tokens":
        config["trainable_token_indices"] = tokens = sorted({0, vocab // 2, vocab - 1})
        return {f"{EMBED}.token_adapter.trainable_tokens_delta": noise(4, len(tokens), hidden)}
    if ends == "head":
        config["modules_to_save"] = ["lm_head"]
        return {f"{HEAD}.weight": noise(5, vocab, hidden)}
    if ends in ("both", "resized"):
        config["modules_to_save"] = ["lm_head", "embed_tokens"]
        size = vocab + 3 * (ends == "resized")
        return {f"{m}.weight": noise(n, size, hidden) for n, m in enumerate((EMBED, HEAD))}
    return {}


def expected(base: Tensors, drawn: Drawn, geometry: Geometry) -> Tensors:
    """The merge in the order of PEFT's operations; tied ends that were trained apart are apart."""
    merged, config = {name: tensor.float() for name, tensor in base.items()}, drawn.config
    rows = config.get("trainable_token_indices")
    ends = (f"{EMBED}.l", f"{EMBED}.w", f"{HEAD}.")
    if geometry.tied and any(name.startswith(ends) for name in drawn.tensors):
        merged["lm_head.weight"] = base["model.embed_tokens.weight"].float()
    for name, tensor in drawn.tensors.items():
        whole = name.replace(".base_layer", "")
        if whole in merged:
            merged[whole] = tensor
    for name, tensor in drawn.tensors.items():
        module, _, part = name.partition(".lora_")
        if part in ("A.weight", "embedding_A"):
            merged[f"{module}.weight"] = changed(merged[f"{module}.weight"], module, drawn)
        elif part == "B.bias":
            merged[f"{module}.bias"] = merged[f"{module}.bias"] + tensor * scaling(module, config)
        elif name.endswith("trainable_tokens_delta"):
            merged[f"{EMBED}.weight"] = merged[f"{EMBED}.weight"].index_put(
                (torch.tensor(rows),), tensor
            )
    (dtype,) = {tensor.dtype for tensor in base.values()}
    return {name: tensor.to(dtype) for name, tensor in merged.items()}


def scaling(module: str, config: Mapping[str, Any]) -> float:
    pattern = config["rank_pattern"]
    rank = pattern.get(get_pattern_key(pattern, module), config["r"])
    return float(config["lora_alpha"] / (math.sqrt(rank) if config["use_rslora"] else rank))


def changed(weight: torch.Tensor, module: str, drawn: Drawn) -> torch.Tensor:
    tensors, s = drawn.tensors, scaling(module, drawn.config)
    magnitude = tensors.get(f"{module}.lora_magnitude_vector")
    if module == EMBED:
        a, b = (tensors[f"{module}.lora_embedding_{x}"] for x in "AB")
        total = weight + ((b @ a) * s).T
        if magnitude is not None:
            total *= magnitude / total.double().norm(dim=0).float()
        return total
    a, b = (tensors[f"{module}.lora_{x}.weight"] for x in "AB")
    total = weight + (b @ a) * s
    if magnitude is not None:
        total = (magnitude / torch.linalg.norm(total, dim=1)).view(-1, 1) * total
    return total


def assert_close(got: Tensors, wanted: Tensors) -> None:
    """Embeddings are summed in another order here; all else is the same to the last bit."""
    loose = f"{EMBED}.weight"
    assert torch.allclose(got[loose].float(), wanted[loose].float(), rtol=1e-2, atol=1e-5)
    assert_same_tensors(*({k: v for k, v in ts.items() if k != loose} for ts in (got, wanted)))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As in a lane; see ``test_any_adapter``."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@given(st.data())
@settings(max_examples=200)
def test_any_combination_merges_as_it_is_written_down(
    folders: Iterator[Path], data: st.DataObject
) -> None:
    folder, geometry = next(folders), data.draw(geometries())
    dtype = DTYPES[data.draw(st.sampled_from(sorted(DTYPES)))]
    tensors = random_tensors(geometry, dtype, seed=data.draw(st.integers(0, 99)))
    base = write_base(folder / "base", tensors, geometry.config, data.draw(st.integers(1, 3)))
    drawn = data.draw(adapters(geometry))
    adapter = drawn.write(folder / "adapter")
    limit = data.draw(st.sampled_from([1, 3000, 10**9]))
    choice = LaneChoice(
        lanes=data.draw(st.integers(1, 3)), read_bytes=1 << 20, reason="the test says so"
    )

    merge(make_plan(base, [adapter], shard_bytes=limit), folder / "out", choice=choice)

    assert_close(read_tensors(folder / "out"), expected(tensors, drawn, geometry))
    report = verify(folder / "out", "numeric")
    assert report.ok, report.findings


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@given(st.data())
@settings(max_examples=10)
def test_peft_reads_these_adapters_in_the_same_way(
    folders: Iterator[Path], data: st.DataObject
) -> None:
    folder, geometry = next(folders), data.draw(geometries().filter(lambda g: not g.tied))
    drawn = data.draw(adapters(geometry).filter(lambda d: not is_resized(d, geometry)))
    tensors = random_tensors(geometry, torch.float32)
    base = write_base(folder / "base", tensors, {**geometry.config, "dtype": "float32"})

    wanted = expected(tensors, drawn, geometry)

    assert_close(oracle(base, drawn.write(folder / "adapter")), wanted)


def is_resized(drawn: Drawn, geometry: Geometry) -> bool:
    """Then PEFT wants a model that was resized."""
    head = drawn.tensors.get("lm_head.weight")
    return head is not None and len(head) != geometry.vocab

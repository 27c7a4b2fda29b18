"""What the numeric comparison finds in tensors of each kind that an adapter can touch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from merged_by_hand import found
from models import changed, edit_json, make_adapter, make_gpt2, read_tensors
from peft import TrainableTokensConfig
from safetensors.torch import load_file, save_file

from merge_core.merge import merge
from merge_core.planner import make_plan

Q0 = "model.layers.0.self_attn.q_proj"
EMBED, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
P = "base_model.model."
TOKENS = TrainableTokensConfig(token_indices=[2, 159], target_modules=["embed_tokens"])

TIED = pytest.mark.filterwarnings("ignore:Model (has|with) `tie_word_embeddings=True` and")

KINDS: dict[str, tuple[dict[str, Any], str, int, str]] = {
    "DoRA": ({"use_dora": True}, f"{Q0}.weight", 5, "merged"),
    "DoRA on embeddings": (
        {"use_dora": True, "target_modules": ["embed_tokens"]},
        EMBED,
        3,
        "merged",
    ),
    "embeddings": ({"target_modules": ["embed_tokens"]}, EMBED, 159, "merged"),
    "a bias on B": (
        {"lora_bias": True, "target_modules": ["q_proj"]},
        f"{Q0}.bias",
        7,
        "merged",
    ),
    "a trained bias": ({"bias": "all", "target_modules": ["q_proj"]}, f"{Q0}.bias", 7, "copied"),
    "a whole module": ({"modules_to_save": ["norm"]}, NORM, 9, "copied"),
    "a whole head": ({"modules_to_save": ["lm_head"]}, HEAD, 33, "copied"),
    "a trained token": ({"trainable_token_indices": [1, 5, 77]}, EMBED, 77, "merged"),
    "a token beside trained ones": ({"trainable_token_indices": [1, 5]}, EMBED, 6, "merged"),
    "the tuner of tokens": ({"config": TOKENS}, EMBED, 159, "merged"),
    "a head": ({"target_modules": ["lm_head"]}, HEAD, 12, "merged"),
}


def plant(out: Path, name: str, row: int, steps: int = 2) -> None:
    """Move the first value of a row by some units in the last place."""
    for file in out.glob("*.safetensors"):
        tensors = load_file(file)
        if name in tensors:
            bits = tensors[name].view(torch.int16)
            rows = bits.unsqueeze(-1) if bits.dim() == 1 else bits.view(-1, bits.shape[-1])
            rows[row, 0] += steps
            save_file(tensors, file, {"format": "pt"})
            return
    pytest.fail(f"{name} is in no file")


@pytest.mark.parametrize("kind", KINDS)
def test_a_value_that_is_two_units_off_is_found_in_each_kind_of_tensor(
    kind: str, base: Path, tmp_path: Path, out: Path
) -> None:
    fields, name, row, check = KINDS[kind]
    adapter = make_adapter(tmp_path / "adapter", base, **fields)
    merge(make_plan(base, [adapter]), out, level="structure")
    assert found(out, "numeric") == []

    plant(out, name, row)

    wrong = [(c, w) for c, w in found(out, "numeric") if c not in ("digest", "files")]
    assert wrong == [(check, f"model.safetensors: {name}, row {row}")]


def test_a_wrong_value_of_dora_on_transposed_layers_is_found(tmp_path: Path, out: Path) -> None:
    base = make_gpt2(tmp_path / "base", torch.bfloat16)
    fields = {"use_dora": True, "fan_in_fan_out": True, "target_modules": ["c_fc", "c_proj"]}
    adapter = make_adapter(tmp_path / "adapter", base, **fields)
    merge(make_plan(base, [adapter]), out, level="structure")
    assert found(out, "numeric") == []
    name = "transformer.h.1.attn.c_proj.weight"

    plant(out, name, 95)

    assert ("merged", f"model.safetensors: {name}, row 95") in found(out, "numeric")


def with_tensor(adapter: Path, path: Path, key: str, change: Callable[..., Any]) -> Path:
    """A copy of an adapter with another tensor."""
    return changed(adapter, path, lambda saved: saved.update({key: change(saved[key])}))


OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "a magnitude": (
        {"use_dora": True, "target_modules": ["q_proj"]},
        f"{P}{Q0}.lora_magnitude_vector",
    ),
    "a bias of B": ({"lora_bias": True, "target_modules": ["q_proj"]}, f"{P}{Q0}.lora_B.bias"),
    "a trained bias": (
        {"bias": "lora_only", "target_modules": ["q_proj"]},
        f"{P}{Q0}.base_layer.bias",
    ),
    "a whole module": ({"modules_to_save": ["norm"]}, f"{P}{NORM}"),
    "a trained token": (
        {"trainable_token_indices": [1, 5]},
        f"{P}model.embed_tokens.token_adapter.trainable_tokens_delta",
    ),
    "a factor of embeddings": (
        {"target_modules": ["embed_tokens"]},
        f"{P}model.embed_tokens.lora_embedding_A",
    ),
    "the embeddings beside their factors": (
        {"target_modules": ["embed_tokens"]},
        f"{P}model.embed_tokens.base_layer.weight",
    ),
}


@pytest.mark.parametrize("story", OTHERS)
def test_each_tensor_of_an_adapter_counts(
    story: str, base: Path, tmp_path: Path, out: Path
) -> None:
    fields, key = OTHERS[story]
    adapter = make_adapter(tmp_path / "adapter", base, **fields)
    merge(make_plan(base, [adapter]), out, level="structure")
    other = with_tensor(adapter, tmp_path / "other", key, lambda tensor: tensor * 1.5)

    assert found(out, "numeric", adapters=[(adapter, 1.0)]) == []
    assert len(found(out, "numeric", adapters=[(other, 1.0)])) == 1


@TIED
@pytest.mark.parametrize("field", ["tie_word_embeddings", "vocab_size"])
def test_a_config_that_does_not_follow_the_adapter_is_found(
    field: str, bases: Callable[..., Path], tmp_path: Path, out: Path
) -> None:
    base = bases("BF16", tie_word_embeddings=True)
    fields = {"vocabulary": 170, "modules_to_save": ["lm_head"]}
    adapter = make_adapter(tmp_path / "adapter", base, **fields)
    merge(make_plan(base, [adapter]), out, level="numeric")

    edit_json(out / "config.json", **{field: 160 if field == "vocab_size" else True})

    assert ("base", "config.json") in found(out, "numeric")


@TIED
def test_a_head_that_is_missing_is_found(
    bases: Callable[..., Path], tmp_path: Path, out: Path
) -> None:
    base = bases("BF16", tie_word_embeddings=True)
    adapter = make_adapter(tmp_path / "adapter", base, target_modules=["q_proj"])
    merge(make_plan(base, [adapter]), out, level="numeric")
    other = make_adapter(tmp_path / "other", base, target_modules=["lm_head"])

    wrong = found(out, "numeric", adapters=[(other, 1.0)])

    assert ("base", EMBED) in wrong


def test_several_adapters_of_several_kinds_are_checked_as_they_are_summed(
    base: Path, tmp_path: Path, out: Path
) -> None:
    kinds: list[dict[str, Any]] = [{"use_dora": True}, {"r": 3}, {"use_dora": True, "r": 5}]
    adapters = [make_adapter(tmp_path / str(n), base, seed=n, **k) for n, k in enumerate(kinds)]
    weights = [0.5, -0.25, 1.5]
    named = [f"{path}@{weight}" for path, weight in zip(adapters, weights, strict=True)]
    merge(make_plan(base, named), out, level="numeric")
    tensors = read_tensors(base)

    exact = sum_exactly(tensors[f"{Q0}.weight"].double(), adapters, weights)

    got = read_tensors(out)[f"{Q0}.weight"]
    assert ((got.double() - exact).abs() <= exact.abs() / 128 + 1e-4).all()
    plant(out, f"{Q0}.weight", 8)
    assert ("merged", f"model.safetensors: {Q0}.weight, row 8") in found(out, "numeric")


def sum_exactly(w: torch.Tensor, adapters: list[Path], weights: list[float]) -> torch.Tensor:
    """Each adapter changes the base by what it would make of it alone, so many times."""
    total = w.clone()
    for (path, weight), rank in zip(zip(adapters, weights, strict=True), (8, 3, 5), strict=True):
        saved = load_file(path / "adapter_model.safetensors")
        a, b = (saved[f"{P}{Q0}.lora_{x}.weight"].double() for x in "AB")
        changed = w + b @ a * (16 / rank)
        magnitude = saved.get(f"{P}{Q0}.lora_magnitude_vector")
        if magnitude is not None:
            changed *= (magnitude.double() / changed.norm(dim=1))[:, None]
        total += weight * (changed - w)
    return total

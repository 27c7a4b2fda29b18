"""Which tensors, of which shapes, a Qwen1.5 checkpoint must hold, from its config alone.

This is how a base that lacks a layer, or whose config belongs to another size, is refused before
the merge instead of loading with random weights afterwards. Shapes follow transformers'
``Qwen2ForCausalLM``: q, k and v carry a bias, o and the MLP do not. ``Qwen2MoeForCausalLM`` has
experts in the place of the MLP of some layers: each in tensors of its own, as it was published, or
all experts of a layer in one, as transformers 5 has them in memory and can save them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from merge_core.errors import InputError, Problem, some_of

Shape = tuple[int, ...]

_SIZES = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "vocab_size",
)
_DERIVED = ("num_key_value_heads", "head_dim", "decoder_sparse_step")
"""Sizes that follow from the others, or are 1, where the config is silent."""
_MOE_SIZES = ("num_experts", "moe_intermediate_size", "shared_expert_intermediate_size")


_FUSED = (".experts.gate_up_proj", ".experts.down_proj")

LINEAR_MODELS = ("qwen2", "qwen2_moe")
"""Models that are tested: every tensor is known, and every layer is nn.Linear, which stores
[out, in]."""

CONV1D_MODELS = frozenset({"decision_transformer", "gpt2", "imagegpt", "openai-gpt"})
"""Models whose layers are transformers' Conv1D, which stores [in, out]."""

HEAD = "lm_head.weight"

_EMBEDDINGS = ("embed_tokens.weight", "wte.weight")

_LAYER = re.compile(r"model\.layers\.\d+\.")


def is_tied(config: Mapping[str, Any]) -> bool:
    """Whether lm_head shares its weight with the embeddings.

    Where the config is silent, transformers' Qwen2 classes say no and its base class says yes.
    """
    untied_by_default = str(config.get("model_type")).startswith("qwen2")
    return bool(config.get("tie_word_embeddings", not untied_by_default))


def embeddings_among(names: Iterable[str]) -> str | None:
    """Name of the tensor that turns tokens into vectors; None where there is no such tensor."""
    return next((name for name in names if name.endswith(_EMBEDDINGS)), None)


def check_architecture(
    config: Mapping[str, Any], found: Mapping[str, Shape], where: str
) -> list[str]:
    """Compare the tensors ``found`` with what ``config`` asks for; return notes for the user.

    Raises:
        InputError: a tensor of a Qwen1.5 model is missing or has another shape.
    """
    kind = config.get("model_type")
    notes = []
    if config.get("auto_map"):
        notes.append("auto_map in config.json is carried over; its code is never run")
    if not isinstance(kind, str):
        what = "config.json has no model_type"
        raise InputError([Problem(what, where, "Fetch config.json again")])
    if kind not in LINEAR_MODELS:
        return [*notes, f"model_type {kind!r} is not tested; tensors are matched by their names"]
    sizes = (*_SIZES, *(_MOE_SIZES if kind == "qwen2_moe" else ()))
    wrong = [name for name in sizes if not _is_size(config.get(name))]
    wrong += [name for name in _DERIVED if config.get(name) and not _is_size(config[name])]
    wrong += ["mlp_only_layers"] * (not isinstance(config.get("mlp_only_layers") or [], list))
    if wrong:
        what = f"config.json has no valid {', '.join(wrong)}"
        raise InputError([Problem(what, where, "Fetch config.json again")])
    fused = any(name.endswith(_FUSED) for name in found)
    _check_counts(config, len(found), where, fused=fused)
    expected = dict(expected_tensors(config, fused=fused))
    problems = list(_differences(expected, found, where))
    if problems:
        raise InputError(problems)
    return notes


def _check_counts(config: Mapping[str, Any], found: int, where: str, *, fused: bool) -> None:
    """Make sure that there are about as many tensors as asked for, before anything counts them."""
    layers, each = config["num_hidden_layers"], config.get("num_experts", 0)
    if layers > found:
        what = f"layers: config.json asks for {layers}"
    elif not fused and each * sum(has_experts(config, n) for n in range(layers)) > found:
        what = f"experts: config.json asks for {each} in a layer"
    else:
        return
    what = f"the checkpoint lacks {what}, there are {found} tensors in all"
    raise InputError([Problem(what, where, "Fetch config.json again")])


def expected_tensors(
    config: Mapping[str, Any], *, fused: bool = False
) -> Iterator[tuple[str, Shape]]:
    """Names and shapes of a ``Qwen2ForCausalLM`` or ``Qwen2MoeForCausalLM`` with this config.

    Args:
        fused: whether all experts of a layer are in one tensor.
    """
    hidden = config["hidden_size"]
    heads = config["num_attention_heads"]
    head = config.get("head_dim") or hidden // heads
    queries, keys = heads * head, (config.get("num_key_value_heads") or heads) * head
    biased = config.get("model_type") != "qwen2_moe" or config.get("qkv_bias", True)
    yield "model.embed_tokens.weight", (config["vocab_size"], hidden)
    for n in range(config["num_hidden_layers"]):
        layer = f"model.layers.{n}"
        for name, width in (("q", queries), ("k", keys), ("v", keys)):
            yield f"{layer}.self_attn.{name}_proj.weight", (width, hidden)
            if biased:
                yield f"{layer}.self_attn.{name}_proj.bias", (width,)
        yield f"{layer}.self_attn.o_proj.weight", (hidden, queries)
        if has_experts(config, n):
            yield from _experts(config, f"{layer}.mlp", fused=fused)
        else:
            yield from _mlp(f"{layer}.mlp", hidden, config["intermediate_size"])
        yield f"{layer}.input_layernorm.weight", (hidden,)
        yield f"{layer}.post_attention_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    if not is_tied(config):
        yield HEAD, (config["vocab_size"], hidden)


def has_experts(config: Mapping[str, Any], layer: int) -> bool:
    """Whether a layer has experts in the place of its MLP (``Qwen2MoeDecoderLayer``)."""
    if config.get("model_type") != "qwen2_moe" or layer in (config.get("mlp_only_layers") or ()):
        return False
    return (layer + 1) % (config.get("decoder_sparse_step") or 1) == 0


def _mlp(module: str, hidden: int, inner: int) -> Iterator[tuple[str, Shape]]:
    yield f"{module}.gate_proj.weight", (inner, hidden)
    yield f"{module}.up_proj.weight", (inner, hidden)
    yield f"{module}.down_proj.weight", (hidden, inner)


def _experts(config: Mapping[str, Any], module: str, *, fused: bool) -> Iterator[tuple[str, Shape]]:
    hidden, inner = config["hidden_size"], config["moe_intermediate_size"]
    experts = config["num_experts"]
    if fused:
        yield f"{module}.experts.gate_up_proj", (experts, 2 * inner, hidden)
        yield f"{module}.experts.down_proj", (experts, hidden, inner)
    else:
        for number in range(experts):
            yield from _mlp(f"{module}.experts.{number}", hidden, inner)
    yield from _mlp(f"{module}.shared_expert", hidden, config["shared_expert_intermediate_size"])
    yield f"{module}.shared_expert_gate.weight", (1, hidden)
    yield f"{module}.gate.weight", (experts, hidden)


def _is_size(value: Any) -> bool:
    return type(value) is int and value > 0


def _differences(
    expected: Mapping[str, Shape], found: Mapping[str, Shape], where: str
) -> Iterator[Problem]:
    remedy = "Fetch the checkpoint again, or the config.json that belongs to it"
    missing = [name for name in expected if name not in found]
    if missing:
        listed = some_of(missing)
        yield Problem(f"the checkpoint lacks {listed}", where, remedy)
    extra = [name for name in found if _LAYER.match(name) and name not in expected]
    extra = [name for name in extra if not name.endswith("rotary_emb.inv_freq")]  # old, ignored
    if extra:
        listed = some_of(extra)
        yield Problem(f"config.json has no place for {listed}", where, remedy)
    wrong = [name for name in expected if name in found and found[name] != expected[name]]
    for name in wrong[:3]:
        shapes = f"{list(found[name])}, config.json asks {list(expected[name])}"
        yield Problem(f"tensor {name!r} has shape {shapes}", where, remedy)
    if len(wrong) > 3:
        what = f"{len(wrong) - 3} more tensors have other shapes than config.json asks"
        yield Problem(what, where, remedy)

"""Which tensors, of which shapes, a dense Qwen1.5 checkpoint must hold, from its config alone.

This is how a base that lacks a layer, or whose config belongs to another size, is refused before
the merge instead of loading with random weights afterwards. Shapes follow transformers'
``Qwen2ForCausalLM``: q, k and v carry a bias, o and the MLP do not.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
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
_DERIVED = ("num_key_value_heads", "head_dim")
"""Sizes that follow from the others where the config is silent."""


CONV1D_MODELS = frozenset({"decision_transformer", "gpt2", "imagegpt", "openai-gpt"})
"""Models whose layers are transformers' Conv1D, which stores [in, out]."""

_LAYER = re.compile(r"model\.layers\.\d+\.")


def is_tied(config: Mapping[str, Any]) -> bool:
    """Whether lm_head shares its weight with the embeddings.

    Where the config is silent, transformers' Qwen2 classes say no and its base class says yes.
    """
    untied_by_default = str(config.get("model_type")).startswith("qwen2")
    return bool(config.get("tie_word_embeddings", not untied_by_default))


def check_architecture(
    config: Mapping[str, Any], found: Mapping[str, Shape], where: str
) -> list[str]:
    """Compare the tensors ``found`` with what ``config`` asks for; return notes for the user.

    Raises:
        InputError: a tensor of a dense Qwen1.5 model is missing or has another shape.
    """
    kind = config.get("model_type")
    notes = []
    if config.get("auto_map"):
        notes.append("auto_map in config.json is carried over; its code is never run")
    if not isinstance(kind, str):
        what = "config.json has no model_type"
        raise InputError([Problem(what, where, "Fetch config.json again")])
    if kind != "qwen2":
        return [*notes, f"model_type {kind!r} is not tested; tensors are matched by their names"]
    wrong = [name for name in _SIZES if not _is_size(config.get(name))]
    wrong += [name for name in _DERIVED if config.get(name) and not _is_size(config[name])]
    if wrong:
        what = f"config.json has no valid {', '.join(wrong)}"
        raise InputError([Problem(what, where, "Fetch config.json again")])
    if config["num_hidden_layers"] > len(found):  # before anything counts up to it
        asked = f"config.json asks for {config['num_hidden_layers']}"
        what = f"the checkpoint lacks layers: {asked}, there are {len(found)} tensors in all"
        raise InputError([Problem(what, where, "Fetch config.json again")])
    problems = list(_differences(dict(expected_tensors(config)), found, where))
    if problems:
        raise InputError(problems)
    return notes


def expected_tensors(config: Mapping[str, Any]) -> Iterator[tuple[str, Shape]]:
    """Names and shapes of a ``Qwen2ForCausalLM`` with this config."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    heads = config["num_attention_heads"]
    head = config.get("head_dim") or hidden // heads
    queries, keys = heads * head, (config.get("num_key_value_heads") or heads) * head
    yield "model.embed_tokens.weight", (config["vocab_size"], hidden)
    for n in range(config["num_hidden_layers"]):
        layer = f"model.layers.{n}"
        for name, width in (("q", queries), ("k", keys), ("v", keys)):
            yield f"{layer}.self_attn.{name}_proj.weight", (width, hidden)
            yield f"{layer}.self_attn.{name}_proj.bias", (width,)
        yield f"{layer}.self_attn.o_proj.weight", (hidden, queries)
        yield f"{layer}.mlp.gate_proj.weight", (inner, hidden)
        yield f"{layer}.mlp.up_proj.weight", (inner, hidden)
        yield f"{layer}.mlp.down_proj.weight", (hidden, inner)
        yield f"{layer}.input_layernorm.weight", (hidden,)
        yield f"{layer}.post_attention_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    if not is_tied(config):
        yield "lm_head.weight", (config["vocab_size"], hidden)


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

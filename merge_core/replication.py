"""Layer replication: a deeper model whose layers are copies of the base's, each trained apart.

``layer_replication`` of an adapter's config lists ranges [start, end) of the base's layers, which
together are the layers of the model that was trained; the adapter numbers its modules by the new
ones. While PEFT runs such a model the copies share their weights, so its own merge adds the factors
of all copies to each of them. Here every copy is a layer of its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from merge_core.adapter import Adapter
from merge_core.architecture import LINEAR_MODELS, has_experts
from merge_core.checkpoint import Checkpoint
from merge_core.errors import InputError, Problem, refuse, some_of
from merge_core.matched import Matched
from merge_core.plan import Source

_LAYER = re.compile(r"(model\.layers\.)(\d+)(\..+)")
_WINDOW_FROM = 28
"""``max_window_layers`` of Qwen2's config where it is silent."""

_BY_LAYER = frozenset({"layer_types", "mlp_only_layers"})
"""Lists in the configs of ``LINEAR_MODELS`` that go by layer."""


def layer_order(adapters: Sequence[Adapter], checkpoint: Checkpoint) -> tuple[int, ...] | None:
    """The base's layer that each layer of the result is a copy of; None where nothing is copied.

    Raises:
        InputError: the adapters do not agree, or the base has no such layers.
    """
    orders = {adapter.config.replication for adapter in adapters}
    if not any(orders):
        return None
    ranges, *others = orders
    if others:
        what = "the adapters were trained on different copies of layers (layer_replication)"
        raise refuse(what, ", ".join(str(a.path) for a in adapters), "Merge one of them")
    config, where = checkpoint.config, "layer_replication"
    if config.get("model_type") not in LINEAR_MODELS:
        what = f"the layers of model_type {config.get('model_type')!r} cannot be copied"
        raise refuse(what, where, f"Use one of {', '.join(LINEAR_MODELS)}")
    there = config["num_hidden_layers"]
    problems = [
        Problem(f"[{start}, {end}] are none of the base's {there} layers", where, _OTHER_BASE)
        for start, end in ranges
        if not start < end <= there
    ]
    problems += _unclear_fields(config, str(checkpoint.path))
    if problems:
        raise InputError(problems)
    return tuple(layer for start, end in ranges for layer in range(start, end))


_OTHER_BASE = "Give the base that this adapter was trained on"


def _unclear_fields(config: Mapping[str, Any], where: str) -> Iterator[Problem]:
    """What config.json says of single layers, and cannot be said of copies of them."""
    layers = config["num_hidden_layers"]
    types, first = config.get("layer_types"), config.get("max_window_layers", _WINDOW_FROM)
    if types is not None and not (isinstance(types, list) and len(types) == layers):
        what = f"layer_types in config.json is no list of the base's {layers} layers"
        yield Problem(what, where, "Fetch config.json again")
    if config.get("use_sliding_window") and type(first) is not int:
        what = "max_window_layers in config.json is no number of layers"
        yield Problem(what, where, "Fetch config.json again")
    strange = [
        name
        for name, value in config.items()
        if "layer" in name and isinstance(value, list) and value and name not in _BY_LAYER
    ]
    if strange:
        what = f"config.json has {some_of(strange)}, of which it is not known how layers are meant"
        yield Problem(what, where, _OTHER_BASE)


def replicated(bases: Mapping[str, Source], order: Sequence[int]) -> dict[str, Source]:
    """The tensors of the deeper model by name, each with the base's tensor that it is a copy of."""
    result = {name: source for name, source in bases.items() if not _LAYER.fullmatch(name)}
    by_layer: dict[int, dict[str, Source]] = {}
    for name, source in bases.items():
        match = _LAYER.fullmatch(name)
        if match:
            by_layer.setdefault(int(match[2]), {})[match[3]] = source
    for new, old in enumerate(order):
        for rest, source in by_layer.get(old, {}).items():
            result[f"model.layers.{new}{rest}"] = source
    return result


def replicated_config(config: Mapping[str, Any], order: Sequence[int]) -> dict[str, Any]:
    """The fields of config.json that speak of layers, for the layers of the deeper model.

    What follows from a layer's number in the base (Qwen2's sliding windows, Qwen2-MoE's dense
    layers) is written down for each copy, since its new number says something else.
    """
    changes: dict[str, Any] = {"num_hidden_layers": len(order)}
    types = config.get("layer_types") or _window_types(config)
    if types:
        changes["layer_types"] = [types[old] for old in order]
    if config.get("model_type") == "qwen2_moe":
        dense = [n for n, old in enumerate(order) if not has_experts(config, old)]
        changes["mlp_only_layers"] = dense
        changes["decoder_sparse_step"] = 1
    return changes


def describe_copies(matched: Matched, config: Mapping[str, Any], order: Sequence[int]) -> None:
    """Say in config and notes what became of the layers."""
    matched.config_changes |= replicated_config(config, order)
    before = config["num_hidden_layers"]
    note = f"layer_replication: {before} layers become {len(order)}, each a copy of its own"
    left = sorted(set(range(before)) - set(order))
    if left:
        note += f"; there is no copy of {some_of([f'layer {n}' for n in left])}"
    matched.notes.append(note)


def _window_types(config: Mapping[str, Any]) -> list[str]:
    """What Qwen2's config makes of ``max_window_layers``; empty where no layer has a window."""
    first = config.get("max_window_layers", _WINDOW_FROM)
    if not config.get("use_sliding_window") or config.get("sliding_window", 4096) is None:
        return []
    layers = range(config["num_hidden_layers"])
    return ["sliding_attention" if n >= first else "full_attention" for n in layers]

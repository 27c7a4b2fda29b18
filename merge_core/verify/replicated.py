"""The base as it is before anything is added, where an adapter was trained on copies of its layers.

``layer_replication`` is a list of [start, end): the layers start to end - 1 of the base follow one
another in the trained model, and so do the ranges, so a layer may come several times.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from merge_core.errors import refuse
from merge_core.verify.adapter_fields import REMEDY
from merge_core.verify.weights import BaseTensor

_NUMBER = re.compile(r"(?<=^model\.layers\.)\d+(?=\.)")


def ranges_of(fields: Sequence[Mapping[str, Any]], where: str) -> list[list[int]]:
    """The ranges that all adapters agree on; empty without copies.

    Raises:
        InputError: they do not, or they are no ranges.
    """
    found = [list(config.get("layer_replication") or ()) for config in fields]
    if any(one != found[0] for one in found):
        raise refuse("cannot check adapters of different layer_replication", where, REMEDY)
    ranges = found[0] if found else []
    if not all(
        isinstance(one, list) and len(one) == 2 and all(type(n) is int for n in one)
        for one in ranges
    ):
        raise refuse(f"cannot check layer_replication = {ranges!r}", where, REMEDY)
    return ranges


def with_copies(
    tensors: Mapping[str, BaseTensor], ranges: Sequence[Sequence[int]]
) -> dict[str, BaseTensor]:
    """The tensors by the names that they have in the trained model."""
    if not ranges:
        return dict(tensors)
    copies: dict[int, list[int]] = {}
    count = 0
    for start, end in ranges:
        for old in range(start, end):
            copies.setdefault(old, []).append(count)
            count += 1
    named: dict[str, BaseTensor] = {}
    for name, tensor in tensors.items():
        number = _NUMBER.search(name)
        if number is None:
            named[name] = tensor
            continue
        for new in copies.get(int(number[0]), ()):
            named[_NUMBER.sub(str(new), name)] = tensor
    return named


def config_of_copies(config: Mapping[str, Any], ranges: Sequence[Sequence[int]]) -> dict[str, Any]:
    """The fields of config.json that the copies change."""
    if not ranges:
        return {}
    old = [number for start, end in ranges for number in range(start, end)]
    changes: dict[str, Any] = {"num_hidden_layers": len(old)}
    types = config.get("layer_types")
    if not types and config.get("use_sliding_window") and config.get("sliding_window", 1):
        first, kinds = config.get("max_window_layers", 28), ("full", "sliding")
        types = [f"{kinds[n >= first]}_attention" for n in range(config["num_hidden_layers"])]
    if types:
        changes["layer_types"] = [types[number] for number in old]
    if config.get("model_type") == "qwen2_moe":
        step, listed = config.get("decoder_sparse_step", 1), config.get("mlp_only_layers") or []
        dense = [n in listed or (n + 1) % step > 0 or config.get("num_experts") == 0 for n in old]
        changes["mlp_only_layers"] = [n for n, is_dense in enumerate(dense) if is_dense]
        changes["decoder_sparse_step"] = 1
    return changes

"""What a tensor of an adapter's file is, read off its key.

PEFT writes ``base_model.model.`` + the path of a module + one of the endings below. An ending that
is not in the list makes a key unknown, and then the adapter cannot be checked.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_PREFIX = "base_model.model."

A, B, B_BIAS, MAGNITUDE = "A", "B", "bias of B", "magnitude"
EMBEDDING_A, EMBEDDING_B, TOKENS = "embedding A", "embedding B", "tokens"
WEIGHT, BIAS = "weight", "bias"
GATE_UP, DOWN = "gate_up_proj", "down_proj"
"""Parameters with the weights of all experts of a layer."""
SAVED_WEIGHT, SAVED_BIAS = "saved weight", "saved bias"
"""The same as the weight and the bias, where both are there."""

_ENDINGS = {
    "lora_A.weight": A,
    "lora_B.weight": B,
    "lora_B.bias": B_BIAS,
    "lora_magnitude_vector": MAGNITUDE,
    "lora_magnitude_vector.weight": MAGNITUDE,
    "lora_embedding_A": EMBEDDING_A,
    "lora_embedding_B": EMBEDDING_B,
    "token_adapter.trainable_tokens_delta": TOKENS,
    "trainable_tokens_delta": TOKENS,
    "token_adapter.base_layer.weight": WEIGHT,
    "base_layer.weight": WEIGHT,
    "modules_to_save.default.weight": SAVED_WEIGHT,
    "modules_to_save.weight": SAVED_WEIGHT,
    "ln_tuning_layers.weight": WEIGHT,
    "weight": WEIGHT,
    "base_layer.bias": BIAS,
    "ln_tuning_layers.bias": BIAS,
    "modules_to_save.default.bias": SAVED_BIAS,
    "modules_to_save.bias": SAVED_BIAS,
    "bias": BIAS,
    "modules_to_save.default.gate_up_proj": GATE_UP,
    "modules_to_save.gate_up_proj": GATE_UP,
    "gate_up_proj": GATE_UP,
    "modules_to_save.default.down_proj": DOWN,
    "modules_to_save.down_proj": DOWN,
    "down_proj": DOWN,
}
"""The longer ending first, where one ends with another."""

_OTHER_TUNERS = (
    "lora_",
    "base_layer",
    "modules_to_save",
    "token_adapter",
    "ranknum",
    "ln_tuning_layers",
    "original_module",
)
"""A module's path has no such part; where it seems to, the ending is one that is not known here."""

_WRAPPERS = re.compile(r"(\.base_layer)+$")
"""What follows the path of a module of which several parameters were trained."""

_UNUSED = ("lora_velora_embed", "lora_monteclora_sampler.", "original_module.")
"""Tensors that PEFT's merge does not look at: of the training with VeLoRA and MonteCLoRA, and from
before the training of a whole module."""


def sort_keys(keys: Iterable[str]) -> tuple[dict[str, dict[str, str]], list[str]]:
    """Keys by module and by what they are there; and the keys that are not known."""
    modules: dict[str, dict[str, str]] = {}
    unknown = []
    for key in keys:
        module, kind = _parse(key)
        if kind is None or kind in modules.get(module, {}):
            if not any(f".{name}" in key for name in _UNUSED):
                unknown.append(key)
            continue
        modules.setdefault(module, {})[kind] = key
    return modules, unknown


def _parse(key: str) -> tuple[str, str | None]:
    for ending, kind in _ENDINGS.items():
        if key.startswith(_PREFIX) and key.endswith(f".{ending}"):
            module = key[len(_PREFIX) : -len(ending) - 1]
            inside = _WRAPPERS.sub("", module) if kind in (A, B) else module
            if inside and not any(p.startswith(_OTHER_TUNERS) for p in inside.split(".")):
                return module, kind
            return module, None
    return key, None

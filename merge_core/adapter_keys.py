"""The names of tensors in an adapter file: which module each belongs to, and what it is there.

PEFT saves ``base_model.model.`` + path of the module + what its tuner calls the tensor, without
the adapter's name. What is not a tuner's own is a tensor of the model that was trained as a whole,
under the name that it has in the base.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum

PREFIX = "base_model.model."
_INNER = ".base_layer"

NORM = r"ln_tuning_layers\."
"""Before the tensors of a module that LN_TUNING trained: all of the module, in a copy."""


class Part(StrEnum):
    """What a tensor is to its module."""

    A = "lora_A"
    B = "lora_B"
    B_BIAS = "lora_B.bias"
    MAGNITUDE = "lora_magnitude_vector"
    EMBEDDING_A = "lora_embedding_A"
    EMBEDDING_B = "lora_embedding_B"
    TOKENS = "trainable_tokens_delta"
    WEIGHT = "weight"
    BIAS = "bias"
    SAVED_WEIGHT = "modules_to_save.weight"
    SAVED_BIAS = "modules_to_save.bias"
    """Where PEFT saved all of a resized embedding, beside the same under its plain name; in older
    files alone."""
    ORIGINAL_WEIGHT = "original_module.weight"
    ORIGINAL_BIAS = "original_module.bias"
    """From before the training, saved with all of a resized embedding; PEFT never uses it."""
    GATE_UP = "gate_up_proj"
    DOWN = "down_proj"
    """Parameters of a module with the experts of a layer (transformers 5)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """A tensor's name, taken apart."""

    module: str
    """Path of the module, such as ``model.layers.0.self_attn.q_proj``. Where PEFT wrapped it once
    for each of its parameters, ``.base_layer`` follows for each wrapper around the one meant.
    """
    part: Part


_OF_EXPERTS = r"(?<=\.experts\.)(?:modules_to_save\.(?:default\.)?)?"

_NAMES = (
    (r"lora_A\.weight", Part.A),
    (r"lora_B\.weight", Part.B),
    (r"lora_B\.bias", Part.B_BIAS),
    (r"lora_magnitude_vector(?:\.weight)?", Part.MAGNITUDE),
    (r"lora_embedding_A", Part.EMBEDDING_A),
    (r"lora_embedding_B", Part.EMBEDDING_B),
    (r"(?:token_adapter\.)?trainable_tokens_delta", Part.TOKENS),
    # Beside factors or trained tokens PEFT calls the module's own tensors base_layer.
    (rf"(?:(?:token_adapter\.)?base_layer\.|{NORM})?weight", Part.WEIGHT),
    (rf"(?:(?:token_adapter\.)?base_layer\.|{NORM})?bias", Part.BIAS),
    (r"modules_to_save\.(?:default\.)?weight", Part.SAVED_WEIGHT),
    (r"modules_to_save\.(?:default\.)?bias", Part.SAVED_BIAS),
    (r"original_module\.weight", Part.ORIGINAL_WEIGHT),
    (r"original_module\.bias", Part.ORIGINAL_BIAS),
    (rf"{_OF_EXPERTS}gate_up_proj", Part.GATE_UP),
    (rf"{_OF_EXPERTS}down_proj", Part.DOWN),
)
_KEYS = tuple((re.compile(rf"{re.escape(PREFIX)}(.+?)\.{name}"), part) for name, part in _NAMES)
_WRAPPED = frozenset({Part.A, Part.B})
"""What a wrapper within a wrapper can have."""
_FOREIGN = re.compile(
    r"\.(lora_|base_layer\.|modules_to_save|original_module|ranknum|token_adapter|ln_tuning_layers)"
)
"""In the path of a module: then the key is of a kind that is not known here."""


def parse_key(name: str) -> Key | None:
    """The key of a tensor; None if it is of no known kind."""
    for pattern, part in _KEYS:
        match = pattern.fullmatch(name)
        if match is None:
            continue
        wrapped = unwrapped(match[1])[0] if part in _WRAPPED else match[1]
        if not _FOREIGN.search(f".{wrapped}."):
            return Key(module=match[1], part=part)
    return None


def unwrapped(module: str) -> tuple[str, int]:
    """The path of a module itself, and how many wrappers are around the one that is meant."""
    path = module
    while path.endswith(_INNER):
        path = path.removesuffix(_INNER)
    return path, (len(module) - len(path)) // len(_INNER)


def has_token_rows(module: str) -> bool:
    """Whether a module's weight has a row for each token.

    PEFT saves such weights by itself where the vocabulary was resized, or where they have factors.
    """
    return module.rpartition(".")[2] in ("embed_tokens", "lm_head", "wte")

"""Adapters whose values are not worked out here: tuners that PEFT's own layers merge, and KaSA.

What they touch their keys say, so everything else is compared, and so are tensors that they bring
as a whole; what they touch is left to the digests, and the report says so.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from merge_core.errors import refuse
from merge_core.verify.adapter_fields import REMEDY, TYPES
from merge_core.verify.adapter_keys import (
    BIAS,
    DOWN,
    GATE_UP,
    SAVED_BIAS,
    SAVED_WEIGHT,
    WEIGHT,
    sort_keys,
)

_MODEL = "base_model.model."

_BROUGHT = {WEIGHT: "weight", SAVED_WEIGHT: "weight", BIAS: "bias", SAVED_BIAS: "bias"}
"""What a tensor that is no tuner's own may be, and the base's tensor that it stands for."""


def is_elsewhere(config: Mapping[str, Any]) -> bool:
    """Whether an adapter with this config is of such a kind."""
    kind = config.get("peft_type")
    changed_base = kind == "LORA" and config.get("kasa_config") is not None
    return isinstance(kind, str) and (kind not in TYPES or changed_base)


def beside_tuner(
    keys: Collection[str], names: Collection[str]
) -> tuple[dict[str, dict[str, str]], list[str]]:
    """The keys of whole tensors by module and by what they are there; and those of the tuner.

    A tuner's own may end with ``weight`` too, but the base has no tensor at its path.

    Args:
        keys: of the adapter's file.
        names: of the base's tensors.
    """
    modules: dict[str, dict[str, str]] = {}
    found, own = sort_keys(keys)
    for module, kinds in found.items():
        for kind, key in kinds.items():
            whole = kind in _BROUGHT and f"{module}.{_BROUGHT[kind]}" in names
            if whole or kind in (GATE_UP, DOWN):
                modules.setdefault(module, {})[kind] = key
            else:
                own.append(key)
    return modules, own


def touched(keys: Iterable[str], names: Iterable[str], where: str) -> frozenset[str]:
    """The tensors of the base whose modules have any of a tuner's keys.

    Raises:
        InputError: there is none, so the file does not say what was changed.
    """
    held = [key.removeprefix(_MODEL) for key in keys if key.startswith(_MODEL)]
    inside = {key[:end] for key in held for end, sign in enumerate(key) if sign == "."}
    found = frozenset(name for name in names if name.rpartition(".")[0] in inside)
    if not found:
        raise refuse("cannot check what its file does not name: its tensors", where, REMEDY)
    return found

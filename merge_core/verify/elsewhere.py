"""Adapters whose values are not worked out here: tuners that PEFT's own layers merge, and KaSA.

What they touch their keys say, so everything else is compared; what they touch is left to the
digests, and the report says so.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from merge_core.errors import refuse
from merge_core.verify.adapter_fields import REMEDY, TYPES

_MODEL = "base_model.model."


def is_elsewhere(config: Mapping[str, Any]) -> bool:
    """Whether an adapter with this config is of such a kind."""
    kind = config.get("peft_type")
    changed_base = kind == "LORA" and config.get("kasa_config") is not None
    return isinstance(kind, str) and (kind not in TYPES or changed_base)


def touched(keys: Iterable[str], names: Iterable[str], where: str) -> frozenset[str]:
    """The tensors of the base whose modules have anything in the adapter's file.

    Raises:
        InputError: there is none, so the file does not say what was changed.
    """
    held = [key.removeprefix(_MODEL) for key in keys if key.startswith(_MODEL)]
    inside = {key[:end] for key in held for end, sign in enumerate(key) if sign == "."}
    found = frozenset(name for name in names if name.rpartition(".")[0] in inside)
    if not found:
        raise refuse("cannot check what its file does not name: its tensors", where, REMEDY)
    return found

"""BD-LoRA (``use_bdlora``): which factors are block-diagonal, of which the blocks alone are stored.

PEFT looks for each pattern anywhere in the path of the module (``tuners/lora/variants.py``,
``BdLoraLinearVariant``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from merge_core.errors import refuse

_FIELDS = frozenset({"target_modules_bd_a", "target_modules_bd_b", "nblocks", "match_strict"})


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockDiagonal:
    """Which modules have a block-diagonal factor, and of how many blocks."""

    in_a: tuple[str, ...]
    """Patterns of modules whose A is block-diagonal."""
    in_b: tuple[str, ...]
    blocks: int
    strict: bool
    """Whether each module has such a factor."""

    def blocks_of(self, module: str, at: str) -> tuple[int, int]:
        """Blocks of A and of B; 1 for a factor that is stored as it is.

        Raises:
            InputError: PEFT would not train such a module.
        """
        a, b = (any(name in module for name in names) for names in (self.in_a, self.in_b))
        if (a and b) or (self.strict and not a and not b):
            what = f"use_bdlora names {'both' if a else 'neither'} of its factors"
            raise refuse(what, at, "Use the adapter_config.json that was saved with these weights")
        return self.blocks if a else 1, self.blocks if b else 1


def is_block_diagonal(value: Any) -> bool:
    """Whether ``value`` is a ``use_bdlora`` of PEFT."""
    if value is None or value is False:
        return True
    if not isinstance(value, Mapping) or not value.keys() <= _FIELDS:
        return False
    lists = (value.get("target_modules_bd_a"), value.get("target_modules_bd_b"))
    return (
        all(names is None or _are_patterns(names) for names in lists)
        and type(value.get("nblocks", 1)) is int
        and value.get("nblocks", 1) > 0
        and type(value.get("match_strict", True)) is bool
    )


def read_block_diagonal(value: Mapping[str, Any] | None) -> BlockDiagonal | None:
    """What ``use_bdlora`` says, once it is known to be well formed."""
    if not isinstance(value, Mapping):
        return None
    return BlockDiagonal(
        in_a=tuple(value.get("target_modules_bd_a") or ()),
        in_b=tuple(value.get("target_modules_bd_b") or ()),
        blocks=value.get("nblocks", 1),
        strict=value.get("match_strict", True),
    )


def _are_patterns(names: Any) -> bool:
    return isinstance(names, (list, tuple)) and all(isinstance(n, str) and n for n in names)

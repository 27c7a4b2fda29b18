"""LLM.int8() (arXiv:2208.07339) as bitsandbytes stores it.

    weight         int8 [out, in]
    SCB            float32 [out]   largest absolute value of each row
    weight_format  uint8, 0        rows lie as they are

w = weight * SCB / 127 in float32, in the order in which bitsandbytes multiplies.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from merge_core.decoding.module import PackedModule
from merge_core.decoding.stored import AsItLies, Fetch, Stored

if TYPE_CHECKING:
    import torch

PARTS = frozenset({"weight", "SCB", "weight_format"})

_UNIT = 7.874015718698502e-3
"""1 / 127 as bitsandbytes writes it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Int8Decoding(AsItLies):
    """Decodes the weight of one module."""

    scb: Stored
    kind: Literal["int8"] = "int8"

    @property
    def stored(self) -> tuple[Stored, ...]:
        """What it reads."""
        return self.weight, self.scb

    @property
    def dtype(self) -> str:
        """What bitsandbytes' own function gives."""
        return "F32"

    def load(self, fetch: Fetch) -> LoadedInt8:
        """Its tensors."""
        return LoadedInt8(weight=fetch(self.weight), scb=fetch(self.scb))


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedInt8:
    """See ``stored.Rows``."""

    weight: torch.Tensor
    scb: torch.Tensor

    def rows(self, top: int, bottom: int) -> torch.Tensor:
        """Rows lie as they are."""
        return (self.weight[top:bottom] * self.scb[top:bottom].unsqueeze(1)) * _UNIT


def int8_decoding(module: PackedModule) -> Int8Decoding:
    """Account for the parts of one module.

    Raises:
        InputError: some are missing, or do not fit one another.
    """
    module.require("weight", "SCB")
    out, width = module.matrix("weight")
    module.expect("weight", ["I8"], (out, width))
    module.expect("SCB", ["F32"], (out,))
    if "weight_format" in module.parts:
        module.expect("weight_format", ["U8"], ())
        if not module.problems and module.read(module.parts["weight_format"]) != b"\0":
            module.wrong(f"{module.path}.weight_format is not 0: columns are in another order")
    module.check()
    return Int8Decoding(weight=module.parts["weight"], scb=module.parts["SCB"])

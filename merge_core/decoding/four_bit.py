"""NF4 and FP4 (arXiv:2305.14314) as bitsandbytes stores them.

    weight                        uint8 [elements / 2, 1]  two elements a byte, the upper half first
    weight.absmax                 float32 [blocks], or uint8 where it is quantised itself
    weight.quant_map              float32 [16]             the value of each code
    weight.nested_absmax          float32 [blocks / 256]   then
    weight.nested_quant_map       float32 [256]
    weight.quant_state.bitsandbytes__nf4                   JSON: sizes, dtype, offset

w = quant_map[code] * absmax[block], where a quantised absmax is nested_quant_map[absmax] *
nested_absmax[block / 256] + offset; float32 throughout, rounded once to the dtype that the weight
had. The bytes may be stored as elements of another dtype (``bnb_4bit_quant_storage``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from merge_core.decoding.fields import is_size
from merge_core.decoding.module import FETCH, PackedModule
from merge_core.decoding.stored import Fetch, Stored
from merge_core.errors import refuse, shortened
from merge_core.json_text import parse_object
from merge_core.layout import DTYPE_NAMES

if TYPE_CHECKING:
    import torch

STATES = ("weight.quant_state.bitsandbytes__nf4", "weight.quant_state.bitsandbytes__fp4")
PARTS = frozenset(
    {
        *("weight", "weight.absmax", "weight.quant_map"),
        *("weight.nested_absmax", "weight.nested_quant_map", *STATES),
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Nested:
    """How an absmax is quantised itself."""

    absmax: Stored
    quant_map: Stored
    block: int
    offset: float


@dataclass(frozen=True, slots=True, kw_only=True)
class FourBitDecoding:
    """Decodes the weight of one module."""

    weight: Stored
    absmax: Stored
    quant_map: Stored
    nested: Nested | None
    state: Stored
    """Where the next three are from."""
    block: int
    """Elements that share an absmax, counted through the flattened weight."""
    shape: tuple[int, int]
    """[out, in]"""
    dtype: str
    kind: Literal["four_bit"] = "four_bit"

    @property
    def stored(self) -> tuple[Stored, ...]:
        """What it reads; the state was read by planning."""
        nested = (self.nested.absmax, self.nested.quant_map) if self.nested else ()
        return self.weight, self.absmax, self.quant_map, *nested

    def load(self, fetch: Fetch) -> LoadedFourBit:
        """Its tensors."""
        import torch

        absmax = fetch(self.absmax)
        if self.nested is not None:
            scales = fetch(self.nested.absmax).repeat_interleave(self.nested.block)
            absmax = fetch(self.nested.quant_map)[absmax.int()] * scales[: len(absmax)]
            absmax += self.nested.offset
        values = fetch(self.quant_map)
        dtypes = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
        return LoadedFourBit(
            codes=fetch(self.weight).view(torch.uint8).view(-1),
            absmax=absmax,
            pairs=torch.cartesian_prod(values, values),
            block=self.block,
            width=self.shape[1],
            dtype=dtypes[self.dtype],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedFourBit:
    """See ``stored.Rows``."""

    codes: torch.Tensor
    """uint8, two elements in each."""
    absmax: torch.Tensor
    """float32, one a block."""
    pairs: torch.Tensor
    """float32 [256, 2]: the two elements that each byte means."""
    block: int
    width: int
    dtype: torch.dtype

    def rows(self, top: int, bottom: int) -> torch.Tensor:
        """Rows are elements one after another, so blocks may begin and end outside of them."""
        width, block = self.width, self.block
        first, behind = top * width // block, -(-bottom * width // block)
        codes = self.codes[first * block // 2 : behind * block // 2].int()
        values = self.pairs.index_select(0, codes).view(-1)
        whole = len(values) // block  # the tensor may end inside of a block
        values[: whole * block].view(whole, block).mul_(self.absmax[first : first + whole, None])
        values[whole * block :].mul_(self.absmax[behind - 1])
        start = top * width - first * block
        return values[start : start + (bottom - top) * width].to(self.dtype).view(-1, width)


def four_bit_decoding(module: PackedModule) -> FourBitDecoding:
    """Account for the parts of one module.

    Raises:
        InputError: some are missing, or do not fit one another.
    """
    state = next((state for state in STATES if state in module.parts), STATES[0])
    module.require("weight", "weight.absmax", "weight.quant_map", state)
    said = _description(module, state)
    shape: tuple[int, int] = (said["shape"][0], said["shape"][1])
    count = math.prod(shape)
    blocks = -(-count // said["blocksize"])
    nested = "nested_blocksize" in said
    weight = module.parts["weight"].tensor
    if weight.nbytes != -(-count // 2):
        module.wrong(
            f"{weight.name} has {weight.nbytes} bytes, {list(shape)} takes {-(-count // 2)}"
        )
    module.expect("weight.absmax", ["U8" if nested else "F32"], (blocks,))
    module.expect("weight.quant_map", ["F32"], (16,))
    extra = [part for part in module.parts if part.startswith("weight.nested_")]
    if nested:
        module.require("weight.nested_absmax", "weight.nested_quant_map")
        groups = -(-blocks // said["nested_blocksize"])
        module.expect("weight.nested_absmax", ["F32"], (groups,))
        module.expect("weight.nested_quant_map", ["F32"], (256,))
    elif extra:
        module.wrong(f"{module.path}.{extra[0]} is there, and its state says nothing of it")
    module.check()
    parts = module.parts
    return FourBitDecoding(
        weight=parts["weight"],
        absmax=parts["weight.absmax"],
        quant_map=parts["weight.quant_map"],
        nested=Nested(
            absmax=parts["weight.nested_absmax"],
            quant_map=parts["weight.nested_quant_map"],
            block=said["nested_blocksize"],
            offset=said["nested_offset"],
        )
        if nested
        else None,
        state=parts[state],
        block=said["blocksize"],
        shape=shape,
        dtype=DTYPE_NAMES[said["dtype"]],
    )


def _description(module: PackedModule, state: str) -> Mapping[str, Any]:
    """What the state says.

    Raises:
        InputError: it makes no sense.
    """
    stored = module.parts[state]
    where = f"{module.where}, tensor {stored.tensor.name}"
    said = parse_object(module.read(stored), where, FETCH)
    shape = said.get("shape")
    sound = {
        "quant_type": state.endswith(f"__{said.get('quant_type')}"),
        "blocksize": is_size(said.get("blocksize")) and said["blocksize"] % 2 == 0,
        "dtype": said.get("dtype") in DTYPE_NAMES,
        "shape": isinstance(shape, list) and len(shape) == 2 and all(map(is_size, shape)),
    }
    if "nested_blocksize" in said:
        sound |= {
            "nested_blocksize": is_size(said["nested_blocksize"]),
            "nested_dtype": said.get("nested_dtype") == "float32",
            "nested_offset": type(said.get("nested_offset")) in (int, float)
            and math.isfinite(said["nested_offset"]),
        }
    for name in [name for name, fine in sound.items() if not fine]:
        raise refuse(f"says {name} = {shortened(said.get(name))}", where, FETCH)
    return said

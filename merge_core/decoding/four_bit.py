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
    said, parts = _description(module, state), module.parts
    shape: tuple[int, int] = (said["shape"][0], said["shape"][1])
    size, found = -(-math.prod(shape) // 2), parts["weight"].tensor.nbytes
    if found != size:
        module.wrong(f"{module.path}.weight has {found} bytes, {list(shape)} takes {size}")
    blocks = -(-math.prod(shape) // said["blocksize"])
    nested = _nested(module, said, blocks)
    module.expect("weight.absmax", ["F32" if nested is None else "U8"], (blocks,))
    module.expect("weight.quant_map", ["F32"], (16,))
    module.check()
    return FourBitDecoding(
        weight=parts["weight"],
        absmax=parts["weight.absmax"],
        quant_map=parts["weight.quant_map"],
        nested=nested,
        state=parts[state],
        block=said["blocksize"],
        shape=shape,
        dtype=DTYPE_NAMES[said["dtype"]],
    )


def _nested(module: PackedModule, said: Mapping[str, Any], blocks: int) -> Nested | None:
    """How the absmax of so many blocks is quantised, if it is."""
    names = ("weight.nested_absmax", "weight.nested_quant_map")
    if "nested_blocksize" not in said:
        for name in [name for name in names if name in module.parts]:
            module.wrong(f"{module.path}.{name} is there, and its state says nothing of it")
        return None
    module.require(*names)
    module.expect(names[0], ["F32"], (-(-blocks // said["nested_blocksize"]),))
    module.expect(names[1], ["F32"], (256,))
    return Nested(
        absmax=module.parts[names[0]],
        quant_map=module.parts[names[1]],
        block=said["nested_blocksize"],
        offset=said["nested_offset"],
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

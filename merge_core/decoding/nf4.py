"""The base as QLoRA (arXiv:2305.14314) saw it in training: rounded to NF4 and back.

Like bitsandbytes' ``quantize_4bit(w, blocksize=64, quant_type="nf4", compress_statistics=True)``
and ``dequantize_4bit``, from and to the dtype of the weight:

    code    = the NF4 value nearest to w / absmax, absmax being the largest of its block of 64
    offset  = mean of all absmax
    absmax' = the 8-bit value nearest to (absmax - offset) / outer, times outer, plus offset,
              outer being the largest |absmax - offset| of 256 blocks
    w'      = NF4[code] * absmax', in float32, rounded once

Three things depend on the machine in bitsandbytes, and should not here. The mean and the table of
8-bit values are worked out in float64, where the order of the sum does not matter for absmax of 16
bits (it is exact while they are within a factor of 2^19), and rarely survives the rounding of the
mean for those of 32; "nearest" is what the word says, where its kernel for CPUs decides otherwise
close to the middle of two 8-bit values (for some 2 blocks in 1000).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from merge_core.decoding.stored import AsItLies, Fetch, Stored

if TYPE_CHECKING:
    import torch

BLOCK = 64
"""Elements that share an absmax, counted through the flattened weight: QLoRA's own choice, and what
transformers asks for."""

_OUTER = 256
"""Blocks whose absmax share a scale."""

_NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
"""Quantiles of a normal distribution, from the paper's appendix E."""

_TINY = 1e-38
"""What a block of zeros is divided by."""

_CHUNK = BLOCK << 14
"""Elements of which the absmax is taken at once: a copy of them is made."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Nf4Rounding(AsItLies):
    """Rounds one weight."""

    kind: Literal["nf4"] = "nf4"

    @property
    def stored(self) -> tuple[Stored, ...]:
        """What it reads."""
        return (self.weight,)

    @property
    def dtype(self) -> str:
        """The weight's own, in which transformers loads it."""
        return self.weight.tensor.dtype

    def load(self, fetch: Fetch) -> LoadedRounding:
        """The weight, and the absmax of its blocks before and after their own rounding."""
        import torch

        weight = fetch(self.weight)
        chunks = torch.split(weight.view(-1), _CHUNK)
        exact = torch.cat([chunk.view(-1, BLOCK).abs().amax(dim=1).float() for chunk in chunks])
        return LoadedRounding(weight=weight, exact=exact, rounded=_round(exact))


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedRounding:
    """See ``stored.Rows``."""

    weight: torch.Tensor
    exact: torch.Tensor
    """float32, one a block: what the codes are relative to."""
    rounded: torch.Tensor
    """float32, one a block: what they are multiplied with."""

    def rows(self, top: int, bottom: int) -> torch.Tensor:
        """Rows are elements one after another, so blocks may begin and end outside of them."""
        import torch

        width = self.weight.shape[1]
        first, behind = top * width // BLOCK, -(-bottom * width // BLOCK)
        blocks = self.weight.view(-1)[first * BLOCK : behind * BLOCK].float().view(-1, BLOCK)
        inverse = 1.0 / self.exact[first:behind].clamp(min=_TINY).unsqueeze(1)
        values = torch.tensor(_NF4)
        nearest = _nearest(blocks.mul_(inverse).clamp_(-1, 1), values)
        scaled = values[nearest].mul_(self.rounded[first:behind].unsqueeze(1))
        start = top * width - first * BLOCK
        flat = scaled.view(-1)[start : start + (bottom - top) * width]
        return flat.to(self.weight.dtype).view(-1, width)


def _round(absmax: torch.Tensor) -> torch.Tensor:
    """Of each block, after its own quantisation."""
    import torch

    offset = absmax.double().mean().float()
    count = len(absmax)
    padded = torch.zeros(math.ceil(count / _OUTER) * _OUTER)
    torch.sub(absmax, offset, out=padded[:count])
    groups = padded.view(-1, _OUTER)
    outer = groups.abs().amax(dim=1, keepdim=True)
    values = _dynamic_values()
    nearest = _nearest(groups * (1.0 / outer.clamp(min=_TINY)), values)
    return (values[nearest] * outer).view(-1)[:count] + offset


def _nearest(numbers: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Index of the nearest of some sorted values; the lower one in the middle of two."""
    import torch

    return torch.bucketize(numbers, (values[:-1] + values[1:]) / 2, out_int32=True)


def _dynamic_values() -> torch.Tensor:
    """The 256 values of bitsandbytes' signed dynamic map (arXiv:1511.04561): in each of seven
    powers of ten the middles of equal parts, twice as many as in the one below; 0; and 1.
    """
    import torch

    values = [0.0, 1.0]
    for power in range(7):
        parts = 2**power
        for part in range(parts):
            middle = 10.0 ** (power - 6) * (0.1 + 0.9 * (2 * part + 1) / (2 * parts))
            values += [middle, -middle]
    return torch.tensor(sorted(values), dtype=torch.float32)

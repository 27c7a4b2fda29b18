"""AWQ as AutoAWQ stores it for its gemv kernels, with the rows of a weight as rows.

For ``gemv``:

    qweight  int32 [out, in / 8]  eight columns in a word, one after another
    qzeros   int32 [out, words]   the groups of a row in as many words, a multiple of them
    scales   float [out, 8 words]

W[o, i] = scales[o, g] * (q[o, i] - zero[o, g]) with g = i / group_size, in the dtype of the scales.

For ``gemv_fast``, after the packer of llm-awq:

    qweight       int16 [out / 4, in]        four columns in a word, eight apart from each other
    scales        float [8 words, out]
    scaled_zeros  float [8 words, out]       -scale * zero, rounded; GPTQModel calls them qzeros

W[o, i] = scales[g, o] * q[o, i] + scaled_zeros[g, o]. Each row of qweight holds four of the weight,
64 columns of one after 64 of another; of 32 columns, word m of eight has m, m + 8, m + 16, m + 24.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from merge_core.decoding.module import SCALES, PackedModule
from merge_core.decoding.stored import Fetch, Scaled, Stored
from merge_core.decoding.words import dequantise, unpack

if TYPE_CHECKING:
    import torch

_BITS, _A_WORD = 4, 8
_ROWS, _COLUMNS = 4, 64
"""Rows of the weight that lie in one of gemv_fast's, and the columns that alternate."""

_PADDING = {32: 4, 64: 2}
"""The words of a row's groups are a multiple of this, by the group size; from 128 on they are not
padded, and other sizes are not packed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GemvDecoding(Scaled):
    """Decodes the weight of one module."""

    qweight: Stored
    qzeros: Stored
    groups: int
    """In use, of those that there is room for."""
    kind: Literal["awq_gemv"] = "awq_gemv"

    @property
    def stored(self) -> tuple[Stored, ...]:
        """What it reads."""
        return self.qweight, self.qzeros, self.scales

    @property
    def shape(self) -> tuple[int, int]:
        """[out, in]"""
        out, words = self.qweight.tensor.shape
        return out, words * _A_WORD

    def load(self, fetch: Fetch) -> LoadedGemv:
        """Its tensors."""
        return LoadedGemv(
            qweight=fetch(self.qweight),
            zeros=unpack(fetch(self.qzeros), _BITS)[:, : self.groups],
            scales=fetch(self.scales)[:, : self.groups],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedGemv:
    """See ``stored.Rows``."""

    qweight: torch.Tensor
    zeros: torch.Tensor
    """float32 [out, groups]"""
    scales: torch.Tensor
    """[out, groups]"""

    def rows(self, top: int, bottom: int) -> torch.Tensor:
        """Rows lie as they are."""
        numbers = unpack(self.qweight[top:bottom], _BITS)
        return dequantise(numbers, self.zeros[top:bottom], self.scales[top:bottom], None)


@dataclass(frozen=True, slots=True, kw_only=True)
class GemvFastDecoding(Scaled):
    """Decodes the weight of one module."""

    qweight: Stored
    scaled_zeros: Stored
    groups: int
    """In use, of those that there is room for."""
    kind: Literal["awq_gemv_fast"] = "awq_gemv_fast"

    @property
    def stored(self) -> tuple[Stored, ...]:
        """What it reads."""
        return self.qweight, self.scales, self.scaled_zeros

    @property
    def shape(self) -> tuple[int, int]:
        """[out, in]"""
        rows, width = self.qweight.tensor.shape
        return rows * _ROWS, width

    def load(self, fetch: Fetch) -> LoadedGemvFast:
        """Its tensors."""
        return LoadedGemvFast(
            qweight=fetch(self.qweight),
            scales=fetch(self.scales)[: self.groups].t(),
            scaled_zeros=fetch(self.scaled_zeros)[: self.groups].t(),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedGemvFast:
    """See ``stored.Rows``."""

    qweight: torch.Tensor
    scales: torch.Tensor
    """[out, groups]"""
    scaled_zeros: torch.Tensor
    """[out, groups]"""

    def rows(self, top: int, bottom: int) -> torch.Tensor:
        """Four rows of the weight lie in one of what is stored. The sum is exact in float32, as
        scales of 16 bits are multiplied with numbers below 16, so what is rounded is the value.
        """
        import torch

        first, behind = top // _ROWS, -(-bottom // _ROWS)
        words = self.qweight[first:behind].view(behind - first, -1, _ROWS, _COLUMNS // 32, 8)
        words = words.transpose(1, 2).reshape(_ROWS * (behind - first), -1, 1, 8)
        words = words[top - first * _ROWS : bottom - first * _ROWS]
        shifts = torch.arange(0, 16, _BITS, dtype=torch.int16).view(4, 1)
        numbers = (words >> shifts & 15).float()
        scales, zeros = (t[top:bottom] for t in (self.scales, self.scaled_zeros))
        split = numbers.view(bottom - top, scales.shape[1], -1)
        split.mul_(scales.float().unsqueeze(-1)).add_(zeros.float().unsqueeze(-1))
        return split.view(bottom - top, -1).to(self.scales.dtype)


def is_gemv_group(size: int) -> bool:
    """Whether AutoAWQ packs groups of that size for these kernels."""
    return size in _PADDING or size >= 128


def gemv_decoding(module: PackedModule, group_size: int) -> GemvDecoding:
    """Account for the parts of one module.

    Raises:
        InputError: some are missing, or do not fit one another.
    """
    module.require("qweight", "qzeros", "scales")
    out, words = module.matrix("qweight")
    groups, room = _groups(module, words * _A_WORD, group_size)
    module.expect("qweight", ["I32"], (out, words))
    module.expect("qzeros", ["I32"], (out, room // _A_WORD))
    module.expect("scales", SCALES, (out, room))
    module.check()
    parts = module.parts
    return GemvDecoding(
        qweight=parts["qweight"], qzeros=parts["qzeros"], scales=parts["scales"], groups=groups
    )


def gemv_fast_decoding(module: PackedModule, group_size: int) -> GemvFastDecoding:
    """Account for the parts of one module.

    Raises:
        InputError: some are missing, or do not fit one another.
    """
    zeros = "qzeros" if "qzeros" in module.parts else "scaled_zeros"
    module.require("qweight", "scales", zeros)
    rows, width = module.matrix("qweight")
    groups, room = _groups(module, width, group_size)
    module.expect("qweight", ["I16"], (rows, width))
    for part in ("scales", zeros):
        module.expect(part, ["F16", "BF16"], (room, rows * _ROWS))
    if module.parts["scales"].tensor.dtype != module.parts[zeros].tensor.dtype:
        module.wrong(f"scales and {zeros} are of two dtypes")
    if len(module.parts) > 3:
        module.wrong(f"{module.path} has both qzeros and scaled_zeros")
    if width % _COLUMNS:
        module.wrong(f"{width} inputs are no multiple of {_COLUMNS}")
    module.check()
    parts = module.parts
    return GemvFastDecoding(
        qweight=parts["qweight"],
        scales=parts["scales"],
        scaled_zeros=parts[zeros],
        groups=groups,
    )


def _groups(module: PackedModule, width: int, size: int) -> tuple[int, int]:
    """The groups of a row, and how many there is room for."""
    if width % size:
        module.wrong(f"{width} inputs are no multiple of the group size {size}")
    groups, padding = width // size, _PADDING.get(size, 1)
    words = -(-groups // _A_WORD)
    return groups, -(-words // padding) * padding * _A_WORD

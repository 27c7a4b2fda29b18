"""AWQ (arXiv:2306.00978) as AutoAWQ stores it for its gemm kernel.

    qweight  int32 [in, out / 8]      eight columns in a word, in an order of their own
    qzeros   int32 [groups, out / 8]  in the same order
    scales   float [groups, out]

W[o, i] = scales[g, o] * (q[i, o] - zero[g, o]) with g = i / group_size, in the dtype of the scales,
which is the matrix that AutoAWQ multiplies with where it runs without a kernel.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from merge_core.decoding.fields import Field, is_size, one_of, read_fields
from merge_core.decoding.module import SCALES, PackedModule
from merge_core.decoding.stored import Fetch, Stored
from merge_core.decoding.words import dequantise, unpack

if TYPE_CHECKING:
    import torch

_BITS, _A_WORD = 4, 8
_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where in a word the first of its eight columns stands, the second, ..."""

_FIELDS = {
    "bits": Field(default=4, allowed=one_of(_BITS), expected="4"),
    "group_size": Field(
        default=128, allowed=lambda v: is_size(v) or one_of(-1)(v), expected="a size, or -1"
    ),
    "zero_point": Field(default=True, allowed=one_of(True), expected="true"),
    "version": Field(
        default="gemm",
        allowed=lambda v: isinstance(v, str) and v.lower() == "gemm",
        expected="gemm, the only order of AWQ that is decoded",
    ),
    "format": Field(default="gemm", allowed=one_of("gemm"), expected="gemm"),
    "checkpoint_format": Field(default="gemm", allowed=one_of("gemm"), expected="gemm"),
    "pack_dtype": Field(default="int32", allowed=one_of("int32"), expected="int32"),
}
_NEUTRAL = frozenset(
    {
        "backend", "desc_act", "do_fuse", "exllama_config", "fuse_max_seq_len", "lm_head", "meta",
        "method", "modules_to_fuse", "modules_to_not_convert", "sym",
    }
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class AwqDecoding:
    """Decodes the weight of one module."""

    qweight: Stored
    qzeros: Stored
    scales: Stored
    kind: Literal["awq"] = "awq"

    @property
    def stored(self) -> tuple[Stored, ...]:
        """What it reads."""
        return self.qweight, self.qzeros, self.scales

    @property
    def shape(self) -> tuple[int, int]:
        """[out, in]"""
        width, words = self.qweight.tensor.shape
        return words * _A_WORD, width

    @property
    def dtype(self) -> str:
        """Of the scales."""
        return self.scales.tensor.dtype

    def load(self, fetch: Fetch) -> LoadedAwq:
        """Its tensors."""
        return LoadedAwq(
            qweight=fetch(self.qweight),
            zeros=unpack(fetch(self.qzeros), _BITS, _PLACES).t(),
            scales=fetch(self.scales).t(),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedAwq:
    """See ``stored.Rows``."""

    qweight: torch.Tensor
    zeros: torch.Tensor
    """float32 [out, groups]"""
    scales: torch.Tensor
    """[out, groups]"""

    def rows(self, top: int, bottom: int) -> torch.Tensor:
        """Rows of the weight are columns of what is stored, eight to a word."""
        first, behind = top // _A_WORD, -(-bottom // _A_WORD)
        numbers = unpack(self.qweight[:, first:behind], _BITS, _PLACES)
        wanted = numbers[:, top - first * _A_WORD : bottom - first * _A_WORD].t().contiguous()
        return dequantise(wanted, self.zeros[top:bottom], self.scales[top:bottom], None)


@dataclass(frozen=True, slots=True, kw_only=True)
class AwqFormat:
    """What ``quantization_config`` says of all modules."""

    group_size: int
    parts = frozenset({"qweight", "qzeros", "scales"})

    @classmethod
    def of(cls, config: Mapping[str, Any], where: str) -> AwqFormat:
        """Read it.

        Raises:
            InputError: it says what is not understood.
        """
        return cls(group_size=read_fields(config, _FIELDS, _NEUTRAL, where)["group_size"])

    def __str__(self) -> str:
        return f"AWQ, {_BITS} bits"

    def decoding(self, module: PackedModule) -> AwqDecoding:
        """Account for the parts of one module.

        Raises:
            InputError: some are missing, or do not fit one another.
        """
        module.require("qweight", "qzeros", "scales")
        width, words = module.matrix("qweight")
        groups = 1 if self.group_size == -1 else width // self.group_size
        module.expect("qweight", ["I32"], (width, words))
        module.expect("qzeros", ["I32"], (groups, words))
        module.expect("scales", SCALES, (groups, words * _A_WORD))
        if self.group_size != -1 and width % self.group_size:
            module.wrong(f"{width} inputs are no multiple of the group size {self.group_size}")
        module.check()
        parts = module.parts
        return AwqDecoding(qweight=parts["qweight"], qzeros=parts["qzeros"], scales=parts["scales"])

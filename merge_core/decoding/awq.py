"""AWQ (arXiv:2306.00978) as AutoAWQ stores it: which of its layouts, and that of its gemm kernel.

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

from merge_core.decoding.awq_gemv import (
    GemvDecoding,
    GemvFastDecoding,
    gemv_decoding,
    gemv_fast_decoding,
    is_gemv_group,
)
from merge_core.decoding.fields import Field, is_size, one_of, read_fields
from merge_core.decoding.module import FETCH, SCALES, PackedModule
from merge_core.decoding.stored import Fetch, Scaled, Stored
from merge_core.decoding.words import dequantise, unpack
from merge_core.errors import refuse

if TYPE_CHECKING:
    import torch

_BITS, _A_WORD = 4, 8
_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where in a word the first of its eight columns stands, the second, ..."""

_PARTS = {
    "gemm": frozenset({"qweight", "qzeros", "scales"}),
    "gemv": frozenset({"qweight", "qzeros", "scales"}),
    "gemv_fast": frozenset({"qweight", "scales", "scaled_zeros", "qzeros"}),
}
"""By the layout, which is named after the kernel."""

_LAYOUT_FIELDS = ("version", "format", "checkpoint_format")
"""What AutoAWQ, transformers and GPTQModel call it."""


def _layout(value: Any) -> str:
    return value.lower() if isinstance(value, str) else ""


_FIELDS = {
    "bits": Field(default=4, allowed=one_of(_BITS), expected="4"),
    "group_size": Field(
        default=128, allowed=lambda v: is_size(v) or one_of(-1)(v), expected="a size, or -1"
    ),
    "zero_point": Field(default=True, allowed=one_of(True), expected="true"),
    **{
        name: Field(
            default=None, allowed=lambda v: v is None or _layout(v) in _PARTS, expected=said
        )
        for name, said in dict.fromkeys(_LAYOUT_FIELDS, "gemm, gemv or gemv_fast").items()
    },
    "pack_dtype": Field(
        default="int32", allowed=one_of("int32", "int16"), expected="int32, or int16 of gemv_fast"
    ),
}
_NEUTRAL = frozenset(
    {
        "backend", "desc_act", "do_fuse", "exllama_config", "fuse_max_seq_len", "lm_head", "meta",
        "method", "modules_to_fuse", "modules_to_not_convert", "sym",
    }
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class AwqDecoding(Scaled):
    """Decodes the weight of one module."""

    qweight: Stored
    qzeros: Stored
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
    layout: str

    @classmethod
    def of(cls, config: Mapping[str, Any], where: str) -> AwqFormat:
        """Read it.

        Raises:
            InputError: it says what is not understood.
        """
        fields = read_fields(config, _FIELDS, _NEUTRAL, where)
        layouts = {_layout(fields[name]) for name in _LAYOUT_FIELDS if fields[name]} or {"gemm"}
        if len(layouts) > 1:
            named = " and ".join(sorted(layouts))
            raise refuse(f"quantization_config names two layouts of AWQ, {named}", where, FETCH)
        (layout,), size = layouts, fields["group_size"]
        if layout != "gemm" and not is_gemv_group(size):
            what = f"quantization_config has group_size = {size}, which AutoAWQ does not pack for"
            raise refuse(f"{what} {layout}", where, FETCH)
        return cls(group_size=size, layout=layout)

    @property
    def parts(self) -> frozenset[str]:
        """What can stand behind a module's path."""
        return _PARTS[self.layout]

    def __str__(self) -> str:
        return f"AWQ, {_BITS} bits" + (f", {self.layout}" if self.layout != "gemm" else "")

    def decoding(self, module: PackedModule) -> AwqDecoding | GemvDecoding | GemvFastDecoding:
        """Account for the parts of one module.

        Raises:
            InputError: some are missing, or do not fit one another.
        """
        if self.layout == "gemv":
            return gemv_decoding(module, self.group_size)
        if self.layout == "gemv_fast":
            return gemv_fast_decoding(module, self.group_size)
        return _gemm_decoding(module, self.group_size)


def _gemm_decoding(module: PackedModule, group_size: int) -> AwqDecoding:
    module.require("qweight", "qzeros", "scales")
    width, words = module.matrix("qweight")
    groups = 1 if group_size == -1 else width // group_size
    module.expect("qweight", ["I32"], (width, words))
    module.expect("qzeros", ["I32"], (groups, words))
    module.expect("scales", SCALES, (groups, words * _A_WORD))
    if group_size != -1 and width % group_size:
        module.wrong(f"{width} inputs are no multiple of the group size {group_size}")
    module.check()
    parts = module.parts
    return AwqDecoding(qweight=parts["qweight"], qzeros=parts["qzeros"], scales=parts["scales"])

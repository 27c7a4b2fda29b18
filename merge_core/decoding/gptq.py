"""GPTQ (arXiv:2210.17323) as AutoGPTQ and GPTQModel store it.

    qweight  int32 [in * bits / 32, out]      numbers of one column below one another
    qzeros   int32 [groups, out * bits / 32]  zero points, less 1 in ``checkpoint_format`` gptq
    scales   float [groups, out]
    g_idx    int32 [in]                       group of each input; without it they are in order

W[o, i] = scales[g, o] * (q[i, o] - zero[g, o]) with g = g_idx[i], in the dtype of the scales: the
value that both libraries multiply with where they run without a kernel of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from merge_core.decoding.fields import Field, is_size, one_of, read_fields
from merge_core.decoding.module import FETCH, SCALES, PackedModule
from merge_core.decoding.stored import Fetch, Stored
from merge_core.decoding.words import dequantise, unpack
from merge_core.errors import refuse

if TYPE_CHECKING:
    import torch

_FIELDS = {
    "bits": Field(default=4, allowed=one_of(2, 3, 4, 8), expected="2, 3, 4 or 8"),
    "group_size": Field(
        default=128, allowed=lambda v: is_size(v) or one_of(-1)(v), expected="a size, or -1"
    ),
    "desc_act": Field(default=False, allowed=one_of(True, False), expected="true or false"),
    "checkpoint_format": Field(
        default="gptq", allowed=one_of("gptq", "gptq_v2"), expected="gptq or gptq_v2"
    ),
    "format": Field(default="gptq", allowed=one_of("gptq", "gptq_v2"), expected="gptq or gptq_v2"),
    "pack_dtype": Field(default="int32", allowed=one_of("int32"), expected="int32"),
}
_NEUTRAL = frozenset(
    {
        "backend", "batch_size", "block_name_to_quantize", "cache_block_outputs", "damp_percent",
        "damp_auto_increment", "dataset", "disable_exllama", "exllama_config", "lm_head",
        "max_input_length", "meta", "method", "model_file_base_name", "model_name_or_path",
        "model_seqlen", "module_name_preceding_first_block", "modules_in_block_to_quantize", "mse",
        "pad_token_id", "quantizer", "static_groups", "sym", "tokenizer", "true_sequential",
        "use_cuda_fp16", "use_exllama", "version",
    }
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class GptqDecoding:
    """Decodes the weight of one module."""

    qweight: Stored
    qzeros: Stored
    scales: Stored
    g_idx: Stored | None
    bits: int
    less: int
    """What every stored zero point lacks: 1 in the first format."""
    group_size: int
    kind: Literal["gptq"] = "gptq"

    @property
    def stored(self) -> tuple[Stored, ...]:
        """What it reads."""
        return (self.qweight, self.qzeros, self.scales, *([self.g_idx] if self.g_idx else ()))

    @property
    def shape(self) -> tuple[int, int]:
        """[out, in]"""
        words, out = self.qweight.tensor.shape
        return out, words * 32 // self.bits

    @property
    def dtype(self) -> str:
        """Of the scales."""
        return self.scales.tensor.dtype

    def load(self, fetch: Fetch) -> LoadedGptq:
        """Its tensors.

        Raises:
            InputError: a zero point or a group is out of range.
        """
        zeros = unpack(fetch(self.qzeros), self.bits).t()
        if self.less and float(zeros.max()) + 1 == 1 << self.bits:
            raise refuse(
                f"holds a zero point of {1 << self.bits}, which some programs take for 0",
                f"tensor {self.qzeros.tensor.name!r}",
                "Quantise it again in checkpoint_format gptq_v2, which can tell them apart",
            )
        return LoadedGptq(
            qweight=fetch(self.qweight),
            zeros=zeros + self.less,
            scales=fetch(self.scales).t(),
            groups=self._groups(fetch),
            bits=self.bits,
        )

    def _groups(self, fetch: Fetch) -> torch.Tensor | None:
        """The group of each column, or None if they are equal and in order."""
        import torch

        width, count = self.shape[1], self.scales.tensor.shape[0]
        groups = in_order = torch.arange(width) // self.group_size
        if self.g_idx is not None:
            groups = fetch(self.g_idx).long()
            for group in (int(groups.min()), int(groups.max())):
                if not 0 <= group < count:
                    raise refuse(
                        f"names group {group}, and there are {count}",
                        f"tensor {self.g_idx.tensor.name!r}",
                        FETCH,
                    )
        even = width == count * self.group_size
        return None if even and torch.equal(groups, in_order) else groups


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedGptq:
    """See ``stored.Rows``."""

    qweight: torch.Tensor
    zeros: torch.Tensor
    """float32 [out, groups]"""
    scales: torch.Tensor
    """[out, groups]"""
    groups: torch.Tensor | None
    bits: int

    def rows(self, top: int, bottom: int) -> torch.Tensor:
        """Rows of the weight are columns of what is stored."""
        numbers = unpack(self.qweight[:, top:bottom].t().contiguous(), self.bits)
        return dequantise(numbers, self.zeros[top:bottom], self.scales[top:bottom], self.groups)


@dataclass(frozen=True, slots=True, kw_only=True)
class GptqFormat:
    """What ``quantization_config`` says of all modules."""

    bits: int
    group_size: int
    act_order: bool
    less: int
    parts = frozenset({"qweight", "qzeros", "scales", "g_idx"})

    @classmethod
    def of(cls, config: Mapping[str, Any], where: str) -> GptqFormat:
        """Read it.

        Raises:
            InputError: it says what is not understood.
        """
        fields = read_fields(config, _FIELDS, _NEUTRAL, where)
        second = "gptq_v2" in (fields["checkpoint_format"], fields["format"])
        if second and "gptq" in (config.get("checkpoint_format"), config.get("format")):
            raise refuse("format and checkpoint_format contradict each other", where, FETCH)
        return cls(
            bits=fields["bits"],
            group_size=fields["group_size"],
            act_order=fields["desc_act"],
            less=0 if second else 1,
        )

    def __str__(self) -> str:
        return f"GPTQ, {self.bits} bits" + (", format v2" if not self.less else "")

    def decoding(self, module: PackedModule) -> GptqDecoding:
        """Account for the parts of one module.

        Raises:
            InputError: some are missing, or do not fit one another.
        """
        module.require("qweight", "qzeros", "scales", *(["g_idx"] if self.act_order else ()))
        words, out = module.matrix("qweight")
        width = words * 32 // self.bits
        size = width if self.group_size == -1 else self.group_size
        groups = -(-width // size)
        module.expect("qweight", ["I32"], (-(-width * self.bits // 32), out))
        module.expect("qzeros", ["I32"], (groups, -(-out * self.bits // 32)))
        module.expect("scales", SCALES, (groups, out))
        if "g_idx" in module.parts:
            module.expect("g_idx", ["I32"], (width,))
        if out * self.bits % 32 or words * 32 % self.bits:
            module.wrong(f"{self.bits} bits of {out} outputs and {width} inputs fill no words")
        module.check()
        parts = module.parts
        return GptqDecoding(
            qweight=parts["qweight"],
            qzeros=parts["qzeros"],
            scales=parts["scales"],
            g_idx=parts.get("g_idx"),
            bits=self.bits,
            less=self.less,
            group_size=size,
        )

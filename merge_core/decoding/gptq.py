"""GPTQ (arXiv:2210.17323) as AutoGPTQ and GPTQModel store it.

    qweight  int32 [in * bits / 32, out]      numbers of one column below one another
    qzeros   int32 [groups, out * bits / 32]  zero points, less 1 in ``checkpoint_format`` gptq
    scales   float [groups, out]
    g_idx    int32 [in]                       group of each input; without it they are in order

W[o, i] = scales[g, o] * (q[i, o] - zero[g, o]) with g = g_idx[i], in the dtype of the scales: the
value that both libraries multiply with where they run without a kernel of their own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from merge_core.config_values import is_regex
from merge_core.decoding.fields import Field, is_size, one_of, read_fields
from merge_core.decoding.module import FETCH, SCALES, PackedModule
from merge_core.decoding.stored import Fetch, Scaled, Stored
from merge_core.decoding.words import dequantise, unpack
from merge_core.errors import refuse, shortened

if TYPE_CHECKING:
    import torch


def _rule(text: str) -> re.Pattern[str] | None:
    """The regex of a rule, behind ``-:`` or ``+:``; None if it is none that ends in time."""
    pattern = text[2:] if text[:2] in ("-:", "+:") else text
    try:
        return re.compile(pattern) if is_regex(pattern) else None
    except re.error:  # is_regex looks at it within another
        return None


def _are_rules(value: Any) -> bool:
    return value is None or (
        isinstance(value, dict)
        and all(_rule(text) and isinstance(others, dict) for text, others in value.items())
    )


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
    "dynamic": Field(default=None, allowed=_are_rules, expected="a map of regexes to fields"),
}
_OF_MODULES = frozenset({"bits", "group_size", "desc_act"})
"""What GPTQModel's ``dynamic`` may say otherwise of some modules."""

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
class GptqDecoding(Scaled):
    """Decodes the weight of one module."""

    qweight: Stored
    qzeros: Stored
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
class GptqSettings:
    """How a module is packed."""

    bits: int
    group_size: int
    act_order: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class GptqFormat:
    """What ``quantization_config`` says."""

    settings: GptqSettings
    less: int
    rules: tuple[tuple[re.Pattern[str], GptqSettings | None], ...]
    """``dynamic``: the first that matches the beginning of a module's path has its settings; None:
    it is not packed."""
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
            settings=_settings(fields),
            less=0 if second else 1,
            rules=tuple(_rules(fields, where)),
        )

    def __str__(self) -> str:
        said = [f"GPTQ, {self.settings.bits} bits"]
        said += ["format v2"] * (not self.less)
        return ", ".join(said + ["others by module"] * bool(self.rules))

    def decoding(self, module: PackedModule) -> GptqDecoding:
        """Account for the parts of one module.

        Raises:
            InputError: some are missing, or do not fit one another.
        """
        found = (one for rule, one in self.rules if rule.match(module.path))
        settings = next(found, self.settings)
        if settings is None:
            module.wrong("quantization_config says in dynamic that it is not packed, and it is")
            module.check()
            raise AssertionError("what is wrong was not raised")
        return _decoding(module, settings, self.less)


def _settings(fields: Mapping[str, Any]) -> GptqSettings:
    return GptqSettings(
        bits=fields["bits"], group_size=fields["group_size"], act_order=fields["desc_act"]
    )


def _rules(
    fields: Mapping[str, Any], where: str
) -> Iterator[tuple[re.Pattern[str], GptqSettings | None]]:
    """As GPTQModel reads ``dynamic``: ``-:`` before a regex leaves modules out, ``+:`` or nothing
    gives them other settings.
    """
    known = {name: _FIELDS[name] for name in _OF_MODULES}
    for text, others in (fields["dynamic"] or {}).items():
        rule = _rule(text)
        if rule is None:
            raise AssertionError("rules were checked with the other fields")
        if text.startswith("-:"):
            yield rule, None
            continue
        said = read_fields(others, known, _NEUTRAL, f"{where}, dynamic {shortened(text)}")
        mine = {name: said[name] for name in _OF_MODULES if others.get(name) is not None}
        yield rule, _settings({**fields, **mine})


def _decoding(module: PackedModule, settings: GptqSettings, less: int) -> GptqDecoding:
    bits = settings.bits
    module.require("qweight", "qzeros", "scales", *(["g_idx"] if settings.act_order else ()))
    words, out = module.matrix("qweight")
    width = words * 32 // bits
    size = width if settings.group_size == -1 else settings.group_size
    groups = -(-width // size)
    module.expect("qweight", ["I32"], (-(-width * bits // 32), out))
    module.expect("qzeros", ["I32"], (groups, -(-out * bits // 32)))
    module.expect("scales", SCALES, (groups, out))
    if "g_idx" in module.parts:
        module.expect("g_idx", ["I32"], (width,))
    if out * bits % 32 or words * 32 % bits:
        module.wrong(f"{bits} bits of {out} outputs and {width} inputs fill no words")
    module.check()
    parts = module.parts
    return GptqDecoding(
        qweight=parts["qweight"],
        qzeros=parts["qzeros"],
        scales=parts["scales"],
        g_idx=parts.get("g_idx"),
        bits=bits,
        less=less,
        group_size=size,
    )

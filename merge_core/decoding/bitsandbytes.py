"""A base that transformers quantised with bitsandbytes: 4 bits or 8, by module."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from merge_core.decoding import four_bit, int8
from merge_core.decoding.fields import Field, one_of, read_fields
from merge_core.decoding.four_bit import FourBitDecoding, four_bit_decoding
from merge_core.decoding.int8 import Int8Decoding, int8_decoding
from merge_core.decoding.module import PackedModule
from merge_core.errors import refuse

_FLAG = Field(default=False, allowed=one_of(True, False), expected="true or false")
_FIELDS = {
    **dict.fromkeys(("load_in_4bit", "load_in_8bit", "_load_in_4bit", "_load_in_8bit"), _FLAG),
    "bnb_4bit_quant_type": Field(
        default="fp4", allowed=one_of("nf4", "fp4"), expected="nf4 or fp4"
    ),
}
_NEUTRAL = frozenset(
    {
        "bnb_4bit_compute_dtype", "bnb_4bit_quant_storage", "bnb_4bit_use_double_quant",
        "llm_int8_enable_fp32_cpu_offload", "llm_int8_has_fp16_weight", "llm_int8_skip_modules",
        "llm_int8_threshold",
    }
)  # fmt: skip
"""What of it changes values is said once more by each module's own tensors."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BitsAndBytesFormat:
    """What ``quantization_config`` says of all modules."""

    four_bit: bool

    @classmethod
    def of(cls, config: Mapping[str, Any], where: str) -> BitsAndBytesFormat:
        """Read it.

        Raises:
            InputError: it says what is not understood.
        """
        fields = read_fields(config, _FIELDS, _NEUTRAL, where)
        four, eight = (fields[f"load_in_{n}"] or fields[f"_load_in_{n}"] for n in ("4bit", "8bit"))
        if four == eight:
            what = f"quantization_config says load_in_4bit = {four} and load_in_8bit = {eight}"
            raise refuse(what, where, "Fetch config.json again")
        return cls(four_bit=four)

    @property
    def parts(self) -> frozenset[str]:
        """What can stand behind a module's path."""
        return four_bit.PARTS if self.four_bit else int8.PARTS

    def __str__(self) -> str:
        return f"bitsandbytes, {4 if self.four_bit else 8} bits"

    def decoding(self, module: PackedModule) -> FourBitDecoding | Int8Decoding:
        """Account for the parts of one module.

        Raises:
            InputError: some are missing, or do not fit one another.
        """
        return four_bit_decoding(module) if self.four_bit else int8_decoding(module)

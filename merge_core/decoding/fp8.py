"""FP8 with a scale for each block, as DeepSeek and newer Qwen models are published.

    weight            float8_e4m3fn [out, in]
    weight_scale_inv  float [out / block, in / block], or one number for the whole weight

w = weight * weight_scale_inv[block] in float32, despite the name. The matrix products of FP8 apply
the scale in float32 as well, and so does transformers, which then rounds once: here the sum with
the delta is what is rounded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from merge_core.decoding.fields import Field, is_size, one_of, read_fields
from merge_core.decoding.module import SCALES, PackedModule
from merge_core.decoding.stored import AsItLies, Fetch, Stored

if TYPE_CHECKING:
    import torch


_MAX_BLOCK = 1 << 20
"""Longer than any side of a weight; 128 is what is published. Keeps hostile numbers out."""


def _is_block(value: Any) -> bool:
    return value is None or (
        isinstance(value, list)
        and len(value) == 2
        and all(is_size(side) and side <= _MAX_BLOCK for side in value)
    )


_FIELDS = {
    "fmt": Field(default="e4m3", allowed=one_of("e4m3"), expected="e4m3"),
    "scale_fmt": Field(default="float", allowed=one_of("float"), expected="float"),
    "expert_dtype": Field(default="fp8", allowed=one_of("fp8"), expected="fp8"),
    "weight_block_size": Field(
        default=None, allowed=_is_block, expected="two sizes, or null for one scale"
    ),
    "activation_scheme": Field(
        default="dynamic",
        allowed=one_of("dynamic"),
        expected="dynamic: other scales belong to activations",
    ),
}
_NEUTRAL = frozenset(
    {"dequantize", "ignored_layers", "modules_to_convert", "modules_to_not_convert"}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fp8Decoding(AsItLies):
    """Decodes the weight of one module."""

    scale: Stored
    block: tuple[int, int]
    """Rows and columns that share a scale."""
    kind: Literal["fp8"] = "fp8"

    @property
    def stored(self) -> tuple[Stored, ...]:
        """What it reads."""
        return self.weight, self.scale

    @property
    def dtype(self) -> str:
        """Nothing is rounded before the delta."""
        return "F32"

    def load(self, fetch: Fetch) -> LoadedFp8:
        """Its tensors."""
        grid = tuple(-(-n // side) for n, side in zip(self.shape, self.block, strict=True))
        scale = fetch(self.scale).float().reshape(grid)
        return LoadedFp8(weight=fetch(self.weight), scale=scale, block=self.block)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedFp8:
    """See ``stored.Rows``."""

    weight: torch.Tensor
    scale: torch.Tensor
    """float32, one a block."""
    block: tuple[int, int]

    def rows(self, top: int, bottom: int) -> torch.Tensor:
        """Rows lie as they are. Scales are spread over these rows alone: a block may be as large as
        the weight.
        """
        import torch

        high, wide = self.block
        rows = torch.arange(top, bottom) // high
        columns = torch.arange(self.weight.shape[1]) // wide
        return self.weight[top:bottom].float() * self.scale[rows][:, columns]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fp8Format:
    """What ``quantization_config`` says of all modules."""

    block: tuple[int, int] | None
    parts = frozenset({"weight", "weight_scale_inv"})

    @classmethod
    def of(cls, config: Mapping[str, Any], where: str) -> Fp8Format:
        """Read it.

        Raises:
            InputError: it says what is not understood.
        """
        read_fields(config, _FIELDS, _NEUTRAL, where)
        block = config.get("weight_block_size", [128, 128])
        return cls(block=None if block is None else (block[0], block[1]))

    def __str__(self) -> str:
        return "FP8, " + ("one scale a weight" if self.block is None else f"blocks of {self.block}")

    def decoding(self, module: PackedModule) -> Fp8Decoding:
        """Account for the parts of one module.

        Raises:
            InputError: some are missing, or do not fit one another.
        """
        module.require("weight", "weight_scale_inv")
        out, width = module.matrix("weight")
        module.expect("weight", ["F8_E4M3"], (out, width))
        scale = module.parts["weight_scale_inv"].tensor
        if self.block is not None:
            grid = (-(-out // self.block[0]), -(-width // self.block[1]))
            module.expect("weight_scale_inv", SCALES, grid)
        else:
            flat = () if not scale.shape else (1,) * len(scale.shape)
            module.expect("weight_scale_inv", SCALES, flat)
        module.check()
        return Fp8Decoding(
            weight=module.parts["weight"],
            scale=module.parts["weight_scale_inv"],
            block=self.block or (out, width),
        )

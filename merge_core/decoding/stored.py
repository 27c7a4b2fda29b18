"""What a decoding reads, and what it gives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from merge_core.layout import TensorSpec

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """A tensor of the base, where it lies."""

    file: int
    """Index into ``MergePlan.base_files``."""
    tensor: TensorSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class AsItLies:
    """What the decodings share of weights whose rows and columns lie as they are."""

    weight: Stored

    @property
    def shape(self) -> tuple[int, int]:
        """[out, in]"""
        out, width = self.weight.tensor.shape
        return out, width


@dataclass(frozen=True, slots=True, kw_only=True)
class Scaled:
    """What the decodings share of weights that come out in the dtype of their scales."""

    scales: Stored

    @property
    def dtype(self) -> str:
        """Of the scales."""
        return self.scales.tensor.dtype


class Fetch(Protocol):
    """Reads a stored tensor."""

    def __call__(self, stored: Stored, /) -> torch.Tensor:
        """The whole tensor in memory, in its dtype and shape."""
        ...


class Rows(Protocol):
    """A loaded tensor of which any rows can be decoded, by several threads at a time."""

    def rows(self, top: int, bottom: int) -> torch.Tensor:
        """[bottom - top, width] in the decoding's dtype, on the CPU."""
        ...

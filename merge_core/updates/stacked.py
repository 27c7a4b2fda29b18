"""The low-rank updates of the experts that one fused tensor holds.

Such a tensor is [experts, out, in], and taken as a matrix whose experts lie one below the other:
each expert's delta, or that of its gate or its up half, covers some of the rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from merge_core.layout import TensorSpec
from merge_core.updates.factor import Factor
from merge_core.updates.loading import Loading
from merge_core.updates.low_rank import LoadedLowRank, LowRankUpdate

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class StackedUpdate:
    """Adds a low-rank delta to each of several ranges of rows."""

    parts: tuple[tuple[int, LowRankUpdate], ...]
    """The first row of each, in ascending order, and what is added there; at least one."""
    kind: Literal["stacked"] = "stacked"

    @property
    def adapter(self) -> int:
        """Index into ``MergePlan.adapters``."""
        return self.parts[0][1].adapter

    @property
    def rank(self) -> int:
        """Largest inner size of its products."""
        return max(part.rank for _, part in self.parts)

    @property
    def tensors(self) -> tuple[TensorSpec, ...]:
        """What it reads of the adapter."""
        used = {tensor.name: tensor for _, part in self.parts for tensor in part.tensors}
        return tuple(used.values())

    @property
    def factors(self) -> tuple[Factor, ...]:
        """A and B of each part."""
        return tuple(factor for _, part in self.parts for factor in part.factors)

    @property
    def elements(self) -> int:
        """What it holds on the device, in float32."""
        return sum(part.elements for _, part in self.parts)

    def load(self, inputs: Loading) -> LoadedStack:
        """All factors, on the device."""
        return LoadedStack(tuple((first, part.load(inputs)) for first, part in self.parts))


@dataclass(frozen=True, slots=True)
class LoadedStack:
    """Factors in float32, on the device, each pair with the first of its rows."""

    parts: tuple[tuple[int, LoadedLowRank], ...]

    def write(self, into: torch.Tensor, top: int, work: torch.Tensor, *, add: bool) -> None:
        """See ``LoadedLowRank.write``."""
        if not add:
            into.zero_()
        for part, low, high, first in self._within(top, top + len(into)):
            part.write(into[low - top : high - top], low - first, work, add=add)

    def _within(self, top: int, bottom: int) -> Iterator[tuple[LoadedLowRank, int, int, int]]:
        """What lies in some rows: the rows of each part there, and the first of the whole part."""
        for first, part in self.parts:
            low, high = max(first, top), min(first + part.rows, bottom)
            if low < high:
                yield part, low, high, first

"""The low-rank update of a weight: + scaling * B @ A (arXiv:2106.09685).

Linear layers and embeddings alike: an embedding is [vocabulary, dim] where A is [r, vocabulary] and
B is [dim, r], so its delta is transposed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from merge_core.layout import TensorSpec
from merge_core.updates.factor import Factor
from merge_core.updates.loading import Loading

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class LowRankUpdate:
    """Adds scaling * B @ A."""

    adapter: int
    """Index into ``MergePlan.adapters``."""
    a: Factor
    """[rank, in_features]"""
    b: Factor
    """[out_features, rank]"""
    scaling: float
    """alpha / r (or alpha / sqrt(r)) times the adapter's weight."""
    transposed: bool
    """The base stores [in, out] (a Conv1D layer, an embedding), so the delta is transposed."""
    kind: Literal["low_rank"] = "low_rank"

    @property
    def shape(self) -> tuple[int, int]:
        """Of B @ A: [out_features, in_features]."""
        return self.b.shape[0], self.a.shape[1]

    @property
    def rows(self) -> int:
        """Of the base that it covers."""
        return self.shape[1] if self.transposed else self.shape[0]

    @property
    def rank(self) -> int:
        """Inner size of its product."""
        return self.a.shape[0]

    @property
    def tensors(self) -> tuple[TensorSpec, ...]:
        """What it reads of the adapter."""
        return self.a.tensor, self.b.tensor

    @property
    def factors(self) -> tuple[Factor, ...]:
        """A and B."""
        return self.a, self.b

    @property
    def elements(self) -> int:
        """What it holds on the device, in float32."""
        return sum(math.prod(factor.shape) for factor in self.factors)

    def load(self, inputs: Loading) -> LoadedLowRank:
        """Its factors, on the device."""
        a, b = (inputs.matrix(self.adapter, factor) for factor in self.factors)
        return LoadedLowRank(a=a, b=b, scaling=self.scaling, transposed=self.transposed)


@dataclass(frozen=True, slots=True)
class LoadedLowRank:
    """Factors in float32, on the device."""

    a: torch.Tensor
    b: torch.Tensor
    scaling: float
    transposed: bool

    @property
    def rows(self) -> int:
        """How many rows the delta has."""
        return self.a.shape[1] if self.transposed else self.b.shape[0]

    def write(self, into: torch.Tensor, top: int, work: torch.Tensor, *, add: bool) -> None:
        """Write the delta of rows ``top`` ... ``top + len(into)``, or add it to what is there.

        The product first, then the scaling: this is PEFT's order, and shows in the last bit.

        Args:
            into: [rows, width].
            work: scratch of at least as many elements.
        """
        import torch

        bottom, (rows, width) = top + len(into), into.shape
        if not self.transposed and not add:
            torch.mm(self.b[top:bottom], self.a, out=into).mul_(self.scaling)
            return
        product = work[: into.numel()]
        if self.transposed:
            product = product.view(width, rows)
            torch.mm(self.b, self.a[:, top:bottom], out=product)
            product = product.mul_(self.scaling).t()
        else:
            product = product.view(rows, width)
            torch.mm(self.b[top:bottom], self.a, out=product).mul_(self.scaling)
        into.add_(product) if add else into.copy_(product)

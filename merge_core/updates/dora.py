"""DoRA, the weight-decomposed update (arXiv:2402.09353): W' = m * (W + D) / norm(W + D).

D is the low-rank delta, m a trained magnitude for each output of the layer, and the norm is taken
over the weights of that output. In a linear layer, [out, in], these are the elements of one row, so
rows can be merged one by one. In an embedding, [vocabulary, dim], and in a Conv1D layer, [in, out],
they are a column: then all norms are summed up in a pass over the base before the first row.

PEFT computes the norm of a linear layer in float32 and so does this, to the same bits; that of an
embedding it rounds to the dtype of the base, which this does not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from merge_core.layout import TensorSpec
from merge_core.updates.loading import Loading
from merge_core.updates.low_rank import LoadedLowRank, LowRankUpdate

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class DoraUpdate:
    """Adds a low-rank delta and gives every output its trained magnitude."""

    delta: LowRankUpdate
    """Its scaling is the adapter's own, without a weight."""
    magnitude: TensorSpec
    """[out_features]"""
    weight: float
    """The adapter's: how much of the whole change is taken."""
    kind: Literal["dora"] = "dora"

    @property
    def adapter(self) -> int:
        """Index into ``MergePlan.adapters``."""
        return self.delta.adapter

    @property
    def rank(self) -> int:
        """Inner size of its product."""
        return self.delta.rank

    @property
    def tensors(self) -> tuple[TensorSpec, ...]:
        """What it reads of the adapter."""
        return *self.delta.tensors, self.magnitude

    @property
    def elements(self) -> int:
        """What it holds on the device, in float32."""
        return self.delta.elements + math.prod(self.magnitude.shape)

    def load(self, inputs: Loading) -> LoadedDora:
        """Factors and magnitude on the device, and where norms are of columns, these as well."""
        delta = self.delta.load(inputs)
        magnitude = inputs.factor(self.adapter, self.magnitude)
        factor = None
        if self.delta.transposed:
            factor = magnitude / _column_norms(delta, inputs)
        return LoadedDora(delta=delta, magnitude=magnitude, columns=factor, weight=self.weight)


@dataclass(frozen=True, slots=True)
class LoadedDora:
    """What a DoRA update needs on the device, in float32."""

    delta: LoadedLowRank
    magnitude: torch.Tensor
    columns: torch.Tensor | None
    """[width]: magnitude over norm, where norms are of columns."""
    weight: float

    def become(
        self, block: torch.Tensor, inside: slice, base: torch.Tensor, top: int, work: torch.Tensor
    ) -> None:
        """Write what some rows of a block become, by this update alone.

        Args:
            block: [rows, width]; all of it may be written to.
            inside: the rows that are asked for.
            base: these rows of the base.
            top: number of the block's first row.
            work: scratch of at least as many elements as the block has.
        """
        self.delta.write(block, top, work, add=False)
        self._decompose(block[inside], base, top + inside.start)

    def _decompose(self, delta: torch.Tensor, base: torch.Tensor, top: int) -> None:
        """Turn the delta of whole rows into what they become.

        Args:
            delta: [rows, width], from ``delta.write``.
            base: the same rows of the base.
            top: number of the first row.
        """
        import torch

        changed = delta.add_(base)
        if self.columns is not None:
            changed.mul_(self.columns)
            return
        norms = torch.linalg.norm(changed, dim=1)
        changed.mul_((self.magnitude[top : top + len(base)] / norms).unsqueeze(1))


def _column_norms(delta: LoadedLowRank, inputs: Loading) -> torch.Tensor:
    """[width]: norms of the columns of W + D; summed in float64, since a column may be long."""
    import torch

    squares: torch.Tensor | None = None
    for top, base in inputs.base_rows():
        changed, work = torch.empty_like(base), torch.empty(base.numel(), device=base.device)
        delta.write(changed, top, work, add=False)
        part = changed.add_(base).double().square().sum(dim=0)
        squares = part if squares is None else squares + part
    if squares is None:
        raise AssertionError("a planned tensor has rows")
    return squares.sqrt().float()

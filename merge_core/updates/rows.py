"""The update of an embedding by trained tokens: their rows are replaced.

PEFT calls the tensor ``trainable_tokens_delta``, but its rows are the tokens' new embeddings.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from merge_core.layout import TensorSpec
from merge_core.updates.loading import Loading
from merge_core.updates.piece import Change, Piece

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class RowsUpdate:
    """Puts rows in the place of those of the base."""

    adapter: int
    """Index into ``MergePlan.adapters``."""
    rows: TensorSpec
    """[number of tokens, dim]"""
    tokens: tuple[int, ...]
    """The row of the base that each of them replaces."""
    kind: Literal["rows"] = "rows"

    @property
    def rank(self) -> int:
        """It multiplies no matrices."""
        return 0

    @property
    def tensors(self) -> tuple[TensorSpec, ...]:
        """What it reads of the adapter."""
        return (self.rows,)

    @property
    def elements(self) -> int:
        """What it holds on the device, in float32."""
        return math.prod(self.rows.shape)

    def load(self, inputs: Loading) -> LoadedRows:
        """The rows, on the device."""
        return LoadedRows(inputs.factor(self.adapter, self.rows), self.tokens)


@dataclass(frozen=True, slots=True)
class LoadedRows:
    """The rows in float32, on the device."""

    rows: torch.Tensor
    tokens: tuple[int, ...]

    def put(self, piece: Piece, source: torch.Tensor, target: torch.Tensor) -> Change:
        """Put what lies in the piece into ``target``, and say how far it is from ``source``.

        See ``MergeKernel.merge``; a piece may begin and end inside a row.
        """
        change, width = Change(), piece.matrix[1]
        for row, token in zip(self.rows, self.tokens, strict=True):
            first = max(piece.first, token * width)
            behind = min(piece.behind, (token + 1) * width)
            if first >= behind:
                continue
            new = row[first - token * width : behind - token * width]
            old = source[first - piece.source_first : behind - piece.source_first].float()
            target[first - piece.first : behind - piece.first].copy_(new)
            change.add(_change(old, new - old))
        return change


def _change(old: torch.Tensor, delta: torch.Tensor) -> Change:
    return Change(
        base_square=float(old.square().sum()),
        delta_square=float(delta.square().sum()),
        largest=float(delta.abs().max()),
    )

"""A factor of a low-rank update: a stored matrix, a part of one, or the blocks of one.

LoRA on the fused experts of a layer stores the factors of all E experts in one matrix each: A is
[r E, in], where the rows of an expert lie together, and B is [out, r E], where its columns lie E
apart. BD-LoRA stores of a block-diagonal matrix the blocks alone, one below the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from merge_core.layout import TensorSpec

if TYPE_CHECKING:
    import torch

KEPT_TENSORS = 4
"""How many tensors of an adapter that are not used as they are a worker keeps, since the next
update may take the next part of the same: A and B of both parameters of a layer's experts, whose
turns come one after the other."""

Steps = tuple[int, int, int]
"""First, behind the last, and step, as in ``range``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Factor:
    """A matrix, and how it comes out of a tensor of the adapter."""

    tensor: TensorSpec
    """[rows, columns]"""
    rows: Steps | None = None
    """Which of them are meant; None: all."""
    columns: Steps | None = None
    blocks: int = 1
    """How many blocks of a block-diagonal matrix the rows are."""

    @property
    def is_stored(self) -> bool:
        """Whether it is the tensor as it is."""
        return self.rows is None and self.columns is None and self.blocks == 1

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        rows, columns = self.tensor.shape
        rows = rows if self.rows is None else len(range(*self.rows))
        columns = columns if self.columns is None else len(range(*self.columns))
        return rows, columns * self.blocks

    def taken_from(self, stored: torch.Tensor) -> torch.Tensor:
        """The matrix, out of all that the tensor holds."""
        import torch

        if self.blocks > 1:
            blocks = stored.chunk(self.blocks)
            whole: torch.Tensor = torch.block_diag(*blocks)  # type: ignore[no-untyped-call]
            return whole
        taken = stored
        if self.rows is not None:
            taken = taken[slice(*self.rows)]
        if self.columns is not None:
            taken = taken[:, slice(*self.columns)]
        return taken.clone(memory_format=torch.contiguous_format)  # lets go of the rest

"""The update of a bias by the bias that ``lora_bias`` trained beside B: + scaling * vector."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from merge_core.layout import TensorSpec
from merge_core.updates.loading import Loading

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class ShiftUpdate:
    """Adds scaling * vector to a vector."""

    adapter: int
    """Index into ``MergePlan.adapters``."""
    vector: TensorSpec
    scaling: float
    kind: Literal["shift"] = "shift"

    @property
    def rank(self) -> int:
        """It multiplies no matrices."""
        return 0

    @property
    def tensors(self) -> tuple[TensorSpec, ...]:
        """What it reads of the adapter."""
        return (self.vector,)

    @property
    def elements(self) -> int:
        """What it holds on the device, in float32."""
        return math.prod(self.vector.shape)

    def load(self, inputs: Loading) -> LoadedShift:
        """The vector, on the device."""
        return LoadedShift(inputs.factor(self.adapter, self.vector), self.scaling)


@dataclass(frozen=True, slots=True)
class LoadedShift:
    """The vector in float32, on the device."""

    vector: torch.Tensor
    scaling: float

    def write(self, into: torch.Tensor, top: int, work: torch.Tensor, *, add: bool) -> None:
        """Write the delta of elements ``top`` ... ``top + len(into)``, or add it to what is there.

        Args:
            into: [elements, 1].
            work: scratch of at least as many elements.
        """
        delta = work[: into.numel()].view(into.shape)
        delta.copy_(self.vector[top : top + len(into)].unsqueeze(1)).mul_(self.scaling)
        into.add_(delta) if add else into.copy_(delta)

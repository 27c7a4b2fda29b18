"""The update that PEFT itself works out: any tuner whose layers it can merge.

PEFT's own layer is built around this one weight in float32, merges itself, and its weight is what
the rows become. This is what PEFT computes for a base in float32; it is then rounded once. Where
PEFT rounds once in the base's dtype too, the bits are the same.
"""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from merge_core.errors import refuse
from merge_core.layout import TensorSpec
from merge_core.updates.loading import Loading
from merge_core.updates.tuning import Layer, Part

if TYPE_CHECKING:
    import torch

_ONE_AT_A_TIME = threading.Lock()
"""A layer takes several times the memory of its weight; and warnings, the generator of random
numbers and the order of PEFT's imports are those of the whole process."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PeftUpdate:
    """Makes of a tensor what PEFT makes of it."""

    adapter: int
    """Index into ``MergePlan.adapters``, whose ``tuning`` says the rest."""
    layer: Layer
    """The one that the tensor belongs to."""
    part: Part
    """Which tensor of the layer it is."""
    tensors: tuple[TensorSpec, ...]
    """What it reads of the adapter, beside what all layers share."""
    weight: float
    """The adapter's: how much of the whole change is taken."""
    kind: Literal["through_peft"] = "through_peft"

    @property
    def rank(self) -> int:
        """What is multiplied is PEFT's business."""
        return 0

    @property
    def elements(self) -> int:
        """What it holds on the device, in float32: the whole tensor."""
        return math.prod(self.layer.shape) if self.part == "weight" else max(self.layer.shape)

    def load(self, inputs: Loading) -> LoadedPeft:
        """The merged tensor, on the device.

        Raises:
            InputError: PEFT is not installed, or finds the adapter other than its config promises.
        """
        tuning, path = inputs.tuning(self.adapter), inputs.path(self.adapter)
        try:
            from merge_core.updates.peft_layer import merge_layer
        except ImportError as error:
            what = f"PEFT, which merges it, cannot be imported on this machine ({error})"
            remedy = f"Install peft {tuning.peft} there, with all that it depends on"
            raise refuse(what, str(path), remedy) from error
        with _ONE_AT_A_TIME:
            held = {
                tensor.name: inputs.factor(self.adapter, tensor)
                for tensor in (*self.tensors, *tuning.shared)
            }
            parts = ("weight", "bias") if self.layer.bias else ("weight",)
            # Its own by no name: what was trained of a tied head may end up in the embeddings.
            names = {p: None if p == self.part else f"{self.layer.path}.{p}" for p in parts}
            base = {part: inputs.whole(name) for part, name in names.items()}
            merged = merge_layer(tuning, self.layer, held, base, path)[self.part]
        return LoadedPeft(merged=merged.reshape(len(merged), -1), weight=self.weight)


@dataclass(frozen=True, slots=True)
class LoadedPeft:
    """The whole tensor as PEFT merges it, in float32 on the device."""

    merged: torch.Tensor
    """[rows, width]"""
    weight: float

    def become(
        self,
        block: torch.Tensor,
        inside: slice,
        base: torch.Tensor,  # noqa: ARG002 - DoRA needs them
        top: int,
        work: torch.Tensor,  # noqa: ARG002
    ) -> None:
        """See ``LoadedDora.become``."""
        block[inside].copy_(self.merged[top + inside.start : top + inside.stop])

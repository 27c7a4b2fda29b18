"""The arithmetic: W' = round_once(float32(W) + s * (B @ A)), block of rows by block of rows.

This is what PEFT's ``merge_and_unload()`` computes for a float32 adapter: the product first, then
the scaling, then one sum in float32, then one rounding. The order matters in the last bit, and so
does the shape of the product, so rows are multiplied in the fixed blocks of ``merge_core.blocks``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from merge_core.blocks import blocks_over
from merge_core.errors import NonFiniteError


@dataclass(frozen=True, slots=True)
class LoadedUpdate:
    """A low-rank update whose factors are on the device, in float32."""

    a: torch.Tensor
    """[rank, in_features]"""
    b: torch.Tensor
    """[out_features, rank]"""
    scaling: float
    transposed: bool


@dataclass(slots=True)
class Change:
    """How much a tensor changed, summed over the pieces that were merged."""

    base_square: float = 0.0
    delta_square: float = 0.0
    largest: float = 0.0
    """Largest absolute element of the delta."""

    def add(self, other: Change) -> None:
        """Include the figures of another piece."""
        self.base_square += other.base_square
        self.delta_square += other.delta_square
        self.largest = max(self.largest, other.largest)


class MergeKernel:
    """Merges runs of elements of a tensor; owns the scratch that it needs, allocated once."""

    def __init__(self, scratch_elements: int, device: torch.device) -> None:
        self._device = device
        self._delta = torch.empty(scratch_elements, dtype=torch.float32, device=device)
        self._work = torch.empty(scratch_elements, dtype=torch.float32, device=device)
        self._figures: list[_Figures] = []
        self._cached: tuple[Sequence[LoadedUpdate], int] = ((), 0)

    def merge(
        self,
        updates: Sequence[LoadedUpdate],
        shape: tuple[int, ...],
        first: int,
        source: torch.Tensor,
        target: torch.Tensor,
    ) -> Change:
        """Write the merged elements ``first`` ... ``first + len(source)`` into ``target``.

        Args:
            updates: the deltas to sum, in this order; all of them of the tensor's shape.
            shape: [rows, width] of the whole tensor.
            first: index of the first element in the flattened tensor.
            source: [n] elements of the base, F32, F16 or BF16, on the device.
            target: [n] elements of the result, in the output dtype, on the device.

        Raises:
            NonFiniteError: a merged element is NaN or infinite; ``where`` names the row.
        """
        rows, width = shape
        behind = first + source.numel()
        blocks = list(blocks_over(rows, width, self._device.type, first, behind))
        while len(self._figures) < len(blocks):
            self._figures.append(_Figures(self._device))
        for figures, (top, bottom) in zip(self._figures, blocks, strict=False):
            low, high = max(first, top * width), min(behind, bottom * width)
            delta = self._block(updates, top, bottom, width)[low - top * width : high - top * width]
            run = slice(low - first, high - first)
            self._add(delta, source[run], target[run], figures)
        change, bounds = _summarise(self._figures[: len(blocks)])
        if not all(bound <= torch.finfo(target.dtype).max / 2 for bound in bounds):  # nor is NaN
            _check_finite(target, first, width)
        return change

    def convert(self, first: int, width: int, source: torch.Tensor, target: torch.Tensor) -> None:
        """Round ``source`` to the dtype of ``target``; refuse what overflows there."""
        target.copy_(source)
        if not float(_peak(target)) <= torch.finfo(target.dtype).max:
            _check_finite(target, first, width)

    def _block(
        self, updates: Sequence[LoadedUpdate], top: int, bottom: int, width: int
    ) -> torch.Tensor:
        """The summed delta of rows ``top`` ... ``bottom``, flattened; kept for the next piece."""
        delta = self._delta[: (bottom - top) * width]
        if self._cached[0] is updates and self._cached[1] == top:
            return delta
        self._cached = ((), 0)
        for number, update in enumerate(updates):
            if number == 0 and not update.transposed:
                torch.mm(update.b[top:bottom], update.a, out=delta.view(-1, width))
                delta.mul_(update.scaling)
                continue
            product = self._work[: delta.numel()]
            if update.transposed:
                product = product.view(width, -1)
                torch.mm(update.b, update.a[:, top:bottom], out=product)
                product = product.mul_(update.scaling).t()
            else:
                product = product.view(-1, width)
                torch.mm(update.b[top:bottom], update.a, out=product).mul_(update.scaling)
            into = delta.view(-1, width)
            into.copy_(product) if number == 0 else into.add_(product)
        self._cached = (updates, top)
        return delta

    def _add(
        self, delta: torch.Tensor, source: torch.Tensor, target: torch.Tensor, figures: _Figures
    ) -> None:
        work = self._work[: delta.numel()]
        work.copy_(source)
        torch.dot(work, work, out=figures.base_square)
        torch.dot(delta, delta, out=figures.delta_square)
        torch.aminmax(delta, out=figures.delta_range)
        target.copy_(work.add_(delta))


class _Figures:
    """Where one block's figures go: views into one tensor, so that reading them back is one copy
    a piece instead of a device round trip a figure.
    """

    def __init__(self, device: torch.device) -> None:
        self.values = torch.zeros(4, dtype=torch.float32, device=device)
        self.base_square, self.delta_square = self.values[0], self.values[1]
        self.delta_range = (self.values[2], self.values[3])


def _summarise(figures: Sequence[_Figures]) -> tuple[Change, list[float]]:
    """The change of all blocks, and a bound on the results of each, which saves a look at them.

    No element is larger than the norm of its block, so base and delta together stay below
    norm + |least| + |most|. That is NaN or infinite where a NaN or an infinity went in.
    """
    change, bounds = Change(), []
    for base, delta, low, high in torch.stack([f.values for f in figures]).tolist():
        change.add(Change(base_square=base, delta_square=delta, largest=max(-low, high)))
        bounds.append(math.sqrt(base) + abs(low) + abs(high))
    return change, bounds


def _peak(values: torch.Tensor) -> torch.Tensor:
    """Largest absolute value; NaN if there is one."""
    low, high = torch.aminmax(values)
    return torch.maximum(-low, high)


def _check_finite(target: torch.Tensor, first: int, width: int) -> None:
    bad = torch.nonzero(~torch.isfinite(target)).flatten()
    if bad.numel():
        element = first + int(bad[0])
        overflow = "; float16 overflows above 65504" * (target.dtype == torch.float16)
        raise NonFiniteError(
            f"row {element // width}, column {element % width} is {float(target[bad[0]])}",
            remedy=f"Check base and adapter there{overflow}.",
        )

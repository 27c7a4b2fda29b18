"""The arithmetic: W' = round_once(float32(W) + s * (B @ A)), block of rows by block of rows.

This is what PEFT's ``merge_and_unload()`` computes for a float32 adapter: the product first, then
the scaling, then one sum in float32, then one rounding. The order matters in the last bit, and so
does the shape of the product, so rows are multiplied in the fixed blocks of ``merge_core.blocks``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from merge_core.blocks import blocks_over
from merge_core.errors import NonFiniteError
from merge_core.updates import Update
from merge_core.updates.dora import LoadedDora
from merge_core.updates.loading import Loading
from merge_core.updates.low_rank import LoadedLowRank
from merge_core.updates.piece import Change, Piece
from merge_core.updates.rows import LoadedRows
from merge_core.updates.shift import LoadedShift
from merge_core.updates.stacked import LoadedStack
from merge_core.updates.through_peft import LoadedPeft

_DELTAS = (LoadedLowRank, LoadedStack, LoadedShift)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedUpdates:
    """The updates of one tensor, on the device."""

    deltas: tuple[LoadedLowRank | LoadedStack | LoadedShift, ...] = ()
    """To be summed, in this order."""
    remade: tuple[LoadedDora | LoadedPeft, ...] = ()
    """Those that say what rows become, and not what is added to them."""
    rows: tuple[LoadedRows, ...] = ()

    @classmethod
    def of(cls, updates: Iterable[Update], inputs: Loading) -> LoadedUpdates:
        """Load them."""
        loaded = [update.load(inputs) for update in updates]
        return cls(
            deltas=tuple(one for one in loaded if isinstance(one, _DELTAS)),
            remade=tuple(one for one in loaded if isinstance(one, (LoadedDora, LoadedPeft))),
            rows=tuple(one for one in loaded if isinstance(one, LoadedRows)),
        )

    @property
    def adds(self) -> bool:
        """Whether all elements may change, and not only some rows."""
        return bool(self.deltas or self.remade)

    @property
    def is_one_remade(self) -> bool:
        """Whether the result is what one update makes of the base: then nothing is added up, and
        the last bit is PEFT's.
        """
        return len(self.remade) == 1 and not self.deltas and self.remade[0].weight == 1


class MergeKernel:
    """Merges pieces of a tensor; owns the scratch that it needs, allocated once.

    Args:
        block: elements of the largest block of rows.
        scratch: how many such blocks there is room for: two, or four where rows are remade.
    """

    def __init__(self, block: int, scratch: int, device: torch.device) -> None:
        self._device = device
        blocks = [torch.empty(block, dtype=torch.float32, device=device) for _ in range(scratch)]
        self._delta, self._work, *self._spare = blocks or [torch.empty(0), torch.empty(0)]
        self._figures: list[_Figures] = []
        self._cached: tuple[LoadedUpdates | None, int] = (None, 0)

    def merge(
        self, updates: LoadedUpdates, piece: Piece, source: torch.Tensor, target: torch.Tensor
    ) -> Change:
        """Write the merged elements of ``piece`` into ``target``.

        Args:
            updates: all of them of the tensor's shape.
            source: the elements of the base from ``piece.source_first`` on, F32, F16 or BF16, on
                the device; whole rows where they are remade.
            target: the elements of the result, in the output dtype, on the device.

        Raises:
            NonFiniteError: a merged element is NaN or infinite; ``where`` names the row.
        """
        (rows, width), first, behind = piece.matrix, piece.first, piece.behind
        blocks = list(blocks_over(rows, width, self._device.type, first, behind))
        while len(self._figures) < len(blocks):
            self._figures.append(_Figures(self._device))
        for figures, (top, bottom) in zip(self._figures, blocks, strict=False):
            low, high = max(first, top * width), min(behind, bottom * width)
            into = target[low - first : high - first]
            if updates.remade:
                self._remake(updates, piece, (top, bottom), source, into, figures)
                continue
            base = source[low - piece.source_first : high - piece.source_first]
            if updates.deltas:
                delta = self._block(updates, top, bottom, width)
                self._add(delta[low - top * width : high - top * width], base, into, figures)
            else:
                into.copy_(base)
        change, bounds = _summarise(self._figures[: len(blocks)] if updates.adds else ())
        for rows_ in updates.rows:
            change.add(rows_.put(piece, source, target))
            bounds.append(math.inf)  # of what was carried over nothing is known
        if not all(bound <= torch.finfo(target.dtype).max / 2 for bound in bounds):  # nor is NaN
            _check_finite(target, first, width)
        return change

    def convert(self, first: int, width: int, source: torch.Tensor, target: torch.Tensor) -> None:
        """Round ``source`` to the dtype of ``target``; refuse what overflows there."""
        target.copy_(source)
        if not float(_peak(target)) <= torch.finfo(target.dtype).max:
            _check_finite(target, first, width)

    def _block(self, updates: LoadedUpdates, top: int, bottom: int, width: int) -> torch.Tensor:
        """The summed delta of rows ``top`` ... ``bottom``, flattened; kept for the next piece."""
        delta = self._delta[: (bottom - top) * width]
        if self._cached[0] is updates and self._cached[1] == top:
            return delta
        self._cached = (None, 0)
        for number, update in enumerate(updates.deltas):
            update.write(delta.view(-1, width), top, self._work, add=number > 0)
        self._cached = (updates, top)
        return delta

    def _remake(
        self,
        updates: LoadedUpdates,
        piece: Piece,
        block: tuple[int, int],
        source: torch.Tensor,
        target: torch.Tensor,
        figures: _Figures,
    ) -> None:
        """Merge whole rows, of which ``target`` takes what lies in the piece."""
        width, (top, bottom) = piece.matrix[1], block
        low, high = max(top, piece.first // width), min(bottom, -(-piece.behind // width))
        start, size = low * width, (high - low) * width
        base, result = self._work[:size], self._delta[:size]
        base.copy_(source[start - piece.source_first :][:size])
        self._cached = (None, 0)
        whole, room = self._spare[0][: (bottom - top) * width], self._spare[1]
        rows = whole[start - top * width :][:size]
        result.copy_(base)
        for update in updates.deltas:
            update.write(whole.view(-1, width), top, room, add=False)
            result.add_(rows)
        inner = slice(low - top, high - top)
        for maker in updates.remade:
            maker.become(whole.view(-1, width), inner, base.view(-1, width), top, room)
            if updates.is_one_remade:
                result.copy_(rows)
            else:
                result.add_(rows.sub_(base), alpha=maker.weight)
        inside = slice(max(piece.first - start, 0), min(piece.behind - start, size))
        target.copy_(result[inside])
        _measure(base[inside], result.sub_(base)[inside], figures)

    def _add(
        self, delta: torch.Tensor, source: torch.Tensor, target: torch.Tensor, figures: _Figures
    ) -> None:
        work = self._work[: delta.numel()]
        work.copy_(source)
        _measure(work, delta, figures)
        target.copy_(work.add_(delta))


def _measure(base: torch.Tensor, delta: torch.Tensor, figures: _Figures) -> None:
    torch.dot(base, base, out=figures.base_square)
    torch.dot(delta, delta, out=figures.delta_square)
    torch.aminmax(delta, out=figures.delta_range)


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
    change, bounds = Change(), list[float]()
    if not figures:
        return change, bounds
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

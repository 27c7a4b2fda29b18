"""A piece of a tensor on its way through the arithmetic, and how much it changed there."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Some elements of a tensor that pass the kernel at once."""

    matrix: tuple[int, int]
    """Rows and width of the whole tensor."""
    first: int
    """Index of the first element in the flattened tensor."""
    behind: int
    source_first: int
    """Of the first element of the base that is at hand: before ``first`` where whole rows are."""


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

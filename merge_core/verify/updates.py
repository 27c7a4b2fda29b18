"""What an adapter does to a base tensor: one record a kind.

For a module with factors A [r, in] and B [out, r], PEFT adds ``s * B @ A`` to its weight, see
``adapter_fields`` for s. The other kinds are described with their records.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from merge_core.stores.location import Location
from merge_core.verify.experts import Part


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """``scale * B @ A`` of one adapter, to be added to one base tensor."""

    path: Location
    """Weights file of the adapter."""
    a: str
    """Key of A, [r, in]."""
    b: str
    """Key of B, [out, r]."""
    scale: float
    transposed: bool
    """Whether the base tensor is [in, out], as in Conv1D layers and embeddings."""
    blocks: tuple[int, int] = (1, 1)
    """How many blocks of a block-diagonal A and B the rows of the stored ones are."""
    part: Part = field(default_factory=Part)
    """What is meant of the factors and of the base tensor, where it is not all of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shift:
    """``scale * vector``, the bias of B, to be added to a bias."""

    path: Location
    vector: str
    scale: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Decomposed:
    """DoRA: W becomes (1 - weight) W + weight m V / norm(V) with V = W + delta, where the norm is
    taken, and the magnitude m given, for each output.
    """

    delta: Delta
    magnitude: str
    """Key of m, [out]."""
    weight: float

    @property
    def path(self) -> Location:
        """Weights file of the adapter."""
        return self.delta.path


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Rows of an embedding that are replaced."""

    path: Location
    rows: str
    """Key of the new rows, one for each token."""
    tokens: tuple[int, ...]


Update = Delta | Shift | Decomposed | Rows

"""Tensors that DoRA merged: every value against float64.

With V = W + D, D = s B @ A, and n the norm of V over the weights of each output, the contract is
W' = round(m / n * V), in float32 and rounded once. Besides the error e of V, see ``merged``, there
is that of the norm: a sum of N squares in float32 is off by at most (N - 1) u of itself in any
order, and its root by half of that, and the error of V moves it by at most norm(e). So n is off by
a share of d = (N / 2 + 4) u + norm(e) / n, and a right value satisfies

    |W' - exact| <= half_ulp(W') + m / n * e + |exact| (d + 4 u) (1 + 2^-10) + 2^-120

Norms of columns are summed in float64, which leaves d = 4 u + norm(e) / n. Where an adapter counts
w times, or there are several, the changes w (m / n V - W) are added up, and so are their bounds.

As in ``merged``, a first pass in float32 finds what is surely right, and the rows with anything
else, and some others, are judged in float64. Norms of columns come from a pass over the base: V in
float32, squares summed up in float64, so that the error of V counts twice in d. With L and R the
factors of D, norm(e) of a column is at most u ((r + 7) sum_k norm(L_k) |R_k| + 1.01 n).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from merge_core.stores.location import Location
from merge_core.verify.factors import Factors
from merge_core.verify.header import TensorEntry
from merge_core.verify.merged import (
    SAMPLES,
    UNDERFLOW,
    Product,
    U,
    load_product,
    matrix,
    read_rows,
)
from merge_core.verify.reading import Buffers, Lanes, Source
from merge_core.verify.report import Finding
from merge_core.verify.rounding import half_ulp, quick_half_ulp, to_float32
from merge_core.verify.updates import Decomposed, Delta
from merge_core.verify.wrong import Wrong, findings_of, wrong_values

_TILE = 512 << 10
"""Values computed at a time: some arrays of 2 MB each."""

_SECOND_ORDER = 1 + 2.0**-10

Doubles = npt.NDArray[np.float64]
Singles = npt.NDArray[np.float32]
Indices = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """One DoRA adapter."""

    product: Product
    magnitude: Doubles
    weight: float
    norms: tuple[Doubles, Doubles] | None = None
    """Of the columns, and of their errors; None where norms are of rows."""


class DecomposedTensor:
    """The comparison of a tensor that at least one DoRA adapter touches.

    Args:
        out: the output tensor, and where it is read from.
        base: the same of what it was made from.
    """

    def __init__(
        self,
        out: tuple[Source, TensorEntry],
        base: tuple[Source, TensorEntry],
        updates: Sequence[Decomposed | Delta],
        factors: Mapping[Location, Factors],
    ) -> None:
        self._sources = (out, base)
        self._rows, self._cols = matrix(out[1])
        self._samples = np.unique(np.linspace(0, self._rows - 1, SAMPLES).astype(np.int64))
        plain = [update for update in updates if isinstance(update, Delta)]
        self._plain = load_product(plain, factors) if plain else None
        self._updates = [update for update in updates if isinstance(update, Decomposed)]
        self._parts = [
            _Part(
                product=load_product([update.delta], factors),
                magnitude=factors[update.path].read(update.magnitude).astype(np.float64),
                weight=update.weight,
            )
            for update in self._updates
        ]
        self._is_lone = not plain and len(self._parts) == 1 and self._parts[0].weight == 1

    def findings(self, file: str, lanes: Lanes) -> Iterator[Finding]:
        """At most two: values that are not finite, and values that are wrong.

        Raises:
            OSError: output or base cannot be read.
        """
        entry = self._sources[0][1]
        row_bytes = max(e.nbytes for _, e in self._sources) // max(1, self._rows)
        step = max(1, min(lanes.block // max(1, row_bytes), _TILE // max(1, self._cols)))
        starts = range(0, self._rows if self._cols else 0, step)
        chunks = [(start, min(start + step, self._rows)) for start in starts]
        self._parts = [
            self._with_norms(part, chunks, lanes) if update.delta.transposed else part
            for part, update in zip(self._parts, self._updates, strict=True)
        ]
        results = list(lanes.map(self._check_rows, chunks))
        yield from findings_of(file, entry.name, self._rows * self._cols, results)

    def _with_norms(self, part: _Part, chunks: Sequence[tuple[int, int]], lanes: Lanes) -> _Part:
        """With the norms of its columns, from a pass over the base."""

        def squares(chunk: tuple[int, int], buffers: Buffers) -> Doubles:
            changed = self._base(chunk, buffers) + _quick_product(part.product, slice(*chunk))
            sums: Doubles = np.square(changed, dtype=np.float64).sum(axis=0)
            return sums

        product = part.product
        with np.errstate(all="ignore"):
            norms = np.sqrt(sum(lanes.map(squares, chunks)))
            lengths = np.linalg.norm(product.left * product.scales, axis=0)
            most = lengths @ np.abs(product.right).astype(np.float64)
        off = 2 * U * ((len(product.scales) + 7) * most + 1.01 * norms)
        return replace(part, norms=(norms, off))

    def _base(self, chunk: tuple[int, int], buffers: Buffers) -> Singles:
        source, entry = self._sources[1]
        return to_float32(read_rows(source, entry, chunk, buffers[1]), entry.dtype)

    def _changed(self, part: _Part, was: Doubles, rows: Indices) -> tuple[Doubles, Doubles]:
        """V of some rows, and the bound on its error."""
        delta, size = _product(part.product, rows)
        steps = len(part.product.scales) + part.product.adapters + 4
        return was + delta, U * (steps * size + 1.01 * np.abs(was))

    def _scaled(self, part: _Part, was: Doubles, rows: Indices) -> tuple[Doubles, Doubles]:
        """M / n * V of some rows, and the bound on its error."""
        changed, error = self._changed(part, was, rows)
        if part.norms is None:
            norm, off = (np.linalg.norm(x, axis=1)[:, None] for x in (changed, error))
            magnitude, share = part.magnitude[rows, None], (self._cols / 2 + 4) * U
        else:
            (norm, off), magnitude, share = part.norms, part.magnitude, 4 * U
        value = magnitude / norm * changed
        relative = (share + off / norm + 4 * U) * _SECOND_ORDER
        return value, np.abs(magnitude / norm) * error + np.abs(value) * relative

    def _expected(self, was: Doubles, rows: Indices) -> tuple[Doubles, Doubles]:
        if self._is_lone:
            return self._scaled(self._parts[0], was, rows)
        value, size, error = was.copy(), np.abs(was), np.zeros_like(was)
        terms = len(self._parts) + 2
        if self._plain is not None:
            delta, each = _product(self._plain, rows)
            terms += self._plain.adapters
            value, size = value + delta, size + each
            error += U * (len(self._plain.scales) + 4) * each
        for part in self._parts:
            scaled, off = self._scaled(part, was, rows)
            weight, both = abs(part.weight), np.abs(scaled) + np.abs(was)
            value = value + part.weight * (scaled - was)
            error += weight * (off + 3 * U * both)
            size = size + weight * both
        return value, error + terms * U * size * _SECOND_ORDER

    def _surely_right(self, got: Singles, was: Singles, rows: slice) -> npt.NDArray[np.bool_]:
        """For each row, whether all its values pass in float32."""
        total = was.copy()
        if self._plain is not None:
            total += _quick_product(self._plain, rows)
        for part in self._parts:
            changed = was + _quick_product(part.product, rows)
            if part.norms is None:
                norm = np.linalg.norm(changed, axis=1)
                changed *= (part.magnitude[rows] / norm).astype(np.float32)[:, None]
            else:
                changed *= (part.magnitude / part.norms[0]).astype(np.float32)
            total = changed if self._is_lone else total + np.float32(part.weight) * (changed - was)
        # Strictly less, so that neither NaN nor infinity passes.
        passed = np.abs(total - got) < quick_half_ulp(got, self._sources[0][1].dtype)
        return np.asarray(passed.all(axis=1))

    def _check_rows(
        self, chunk: tuple[int, int], buffers: Buffers
    ) -> tuple[Wrong | None, Wrong | None]:
        source, entry = self._sources[0]
        got = to_float32(read_rows(source, entry, chunk, buffers[0]), entry.dtype)
        was = self._base(chunk, buffers)
        with np.errstate(all="ignore"):  # infinities are findings, not warnings
            doubtful = np.isin(np.arange(*chunk), self._samples)
            doubtful |= ~self._surely_right(got, was, slice(*chunk))
            places = np.flatnonzero(doubtful)
            value, rows = got[places].astype(np.float64), places + chunk[0]
            expected, error = self._expected(was[places].astype(np.float64), rows)
            allowed = half_ulp(value, entry.dtype) + UNDERFLOW + error
            finite = np.isfinite(value)
            # "not within" rather than "beyond": an expected value that is NaN must not pass.
            wrong = finite & ~(np.abs(value - expected) <= allowed)
        tile, tables = slice(0, self._cols), (value, expected, allowed)
        return wrong_values(~finite, rows, tile, *tables), wrong_values(wrong, rows, tile, *tables)


def _product(product: Product, rows: Indices) -> tuple[Doubles, Doubles]:
    """Some rows of a product, and of that of the absolute values."""
    left, right = product.left[rows] * product.scales, product.right.astype(np.float64)
    return left @ right, np.abs(left) @ np.abs(right)


def _quick_product(product: Product, rows: slice) -> Singles:
    """Some rows of a product, in float32."""
    return (product.left[rows] * product.scales).astype(np.float32) @ product.right

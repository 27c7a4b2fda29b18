"""Merged tensors: every value against float64.

The contract is W' = round(f32(W) + sum_k s_k (B_k @ A_k)), computed in float32 in any order and
rounded once to the output's dtype. With u = 2^-24, R the sum of the ranks, K the number of
adapters and P = sum_k |s_k| |B_k| @ |A_k| (elementwise), standard analysis (Higham, Accuracy and
Stability of Numerical Algorithms, 3.1 and 3.5) bounds the steps before the last rounding:

    products                    at most R u P         (each r_k u P_k, with or without FMA)
    s_k to float32, and times   at most 2 u P
    K additions                 at most K u (P + |W|) (no partial sum is larger, in any order)

and the last rounding by half a unit in the last place of W'. So a right value satisfies

    |W' - exact| <= half_ulp(W') + u ((R + K + 4) P + 1.01 K |W|) + 2^-120

where the spare terms pay for second-order terms and float64's own error, and 2^-120 for
underflow. There is no chance in it: a right merge is never called wrong.

Doing all of that in float64 would be several times slower than the disk. So a first pass
recomputes W' in float32; a value less than half an ulp from it is within the bound, because the
pass's own error obeys the same analysis. Rows in which any value is not (about one value in 10^5
for BF16) are judged in float64, and so are ``SAMPLES`` rows of each tensor whatever the first
pass says.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from merge_core.stores.location import Location
from merge_core.verify.experts import factors_of, taken
from merge_core.verify.factors import Factors
from merge_core.verify.header import TensorEntry
from merge_core.verify.reading import Buffers, Lanes, Source
from merge_core.verify.report import Finding
from merge_core.verify.rounding import Array, half_ulp, quick_half_ulp, stored, to_float32
from merge_core.verify.updates import Delta, Shift
from merge_core.verify.wrong import Wrong, findings_of, first_of, wrong_values

SAMPLES = 16
"""Rows of each tensor that are always judged in float64: first, last and evenly between."""

_TILE = 128 << 10
"""Values computed at a time: half a megabyte of float32 stays in a core's second-level cache."""

U = 2.0**-24
UNDERFLOW = 2.0**-120


@dataclass(frozen=True, slots=True, kw_only=True)
class Product:
    """The sum of all deltas of a tensor [rows, cols], as ``(left * scales) @ right``."""

    left: npt.NDArray[np.float32]
    """[rows, R]: the B of all adapters side by side (or A transposed)."""
    right: npt.NDArray[np.float32]
    """[R, cols]."""
    scales: npt.NDArray[np.float64]
    """[R]."""
    adapters: int


def load_product(updates: Sequence[Delta | Shift], factors: Mapping[Location, Factors]) -> Product:
    """Read the factors of one tensor; ``factors`` are the opened weights files by path.

    Raises:
        OSError: a factor cannot be read.
    """
    lefts, rights, scales = [], [], []
    for update in updates:
        read = factors[update.path].read
        if isinstance(update, Shift):
            left, right = read(update.vector)[:, None], np.ones((1, 1), np.float32)
        else:
            if update.part.expert is not None:
                read = factors[update.path].recall
            a, b = (
                _unfolded(read(key), blocks)
                for key, blocks in zip((update.a, update.b), update.blocks, strict=True)
            )
            a, b = factors_of(a, b, update.part)
            left, right = (a.T, b.T) if update.transposed else (b, a)
            left = taken(left, update.part)
        lefts.append(left)
        rights.append(right)
        scales.append(np.full(left.shape[1], update.scale))
    return Product(
        left=np.concatenate(lefts, axis=1),
        right=np.concatenate(rights, axis=0),
        scales=np.concatenate(scales),
        adapters=len(updates),
    )


def _unfolded(stored: npt.NDArray[np.float32], blocks: int) -> npt.NDArray[np.float32]:
    """A block-diagonal matrix, of the blocks that are stored one below the other."""
    if blocks == 1:
        return stored
    rows, width = stored.shape[0] // blocks, stored.shape[1]
    whole = np.zeros((blocks, rows, blocks, width), np.float32)
    diagonal = np.arange(blocks)
    whole[diagonal, :, diagonal] = stored.reshape(blocks, rows, width)
    return whole.reshape(blocks * rows, blocks * width)


class MergedTensor:
    """The comparison of one merged tensor with its base tensor and deltas.

    Args:
        out: reader of the output file.
        entry: the output tensor, [rows, cols].
        base: reader of the base file.
        base_entry: the base tensor, of the same shape.
        product: what the adapters add.
    """

    def __init__(
        self,
        out: Source,
        entry: TensorEntry,
        base: Source,
        base_entry: TensorEntry,
        product: Product,
    ) -> None:
        self._sources = ((out, entry), (base, base_entry))
        self._product = product
        self._rows, self._cols = matrix(entry)
        self._samples = np.unique(np.linspace(0, self._rows - 1, SAMPLES).astype(np.int64))

    def findings(self, file: str, lanes: Lanes) -> Iterator[Finding]:
        """At most two: values that are not finite, and values that are wrong.

        Raises:
            OSError: output or base cannot be read.
        """
        entry = self._sources[0][1]
        row_bytes = max(e.nbytes for _, e in self._sources) // max(1, self._rows)
        step = max(1, lanes.block // max(1, row_bytes))
        starts = range(0, self._rows if self._cols else 0, step)
        chunks = [(start, min(start + step, self._rows)) for start in starts]
        results = list(lanes.map(self._check_rows, chunks))
        yield from findings_of(file, entry.name, self._rows * self._cols, results)

    def _check_rows(
        self, chunk: tuple[int, int], buffers: Buffers
    ) -> tuple[Wrong | None, Wrong | None]:
        """Values of rows ``chunk[0]`` to ``chunk[1]`` that are not finite, and that are wrong."""
        first, stop = chunk
        out, base = (
            read_rows(reader, entry, chunk, buffer)
            for (reader, entry), buffer in zip(self._sources, buffers, strict=True)
        )
        sampled = np.isin(np.arange(first, stop), self._samples)
        infinite, wrong = [], []
        width = max(256, _TILE // (stop - first))
        # Infinities and overflows are findings, not warnings.
        with np.errstate(all="ignore"):
            left = self._product.left[first:stop]
            scaled = (left * self._product.scales).astype(np.float32)
            for start in range(0, self._cols, width):
                tile = slice(start, start + width)
                got = to_float32(out[:, tile], self._sources[0][1].dtype)
                was = to_float32(base[:, tile], self._sources[1][1].dtype)
                doubtful = sampled | ~self._surely_right(got, was, scaled, tile)
                if doubtful.any():
                    rows = np.flatnonzero(doubtful)
                    found = self._judge(got[rows], was[rows], rows + first, tile)
                    infinite.append(found[0])
                    wrong.append(found[1])
        return first_of(infinite), first_of(wrong)

    def _surely_right(
        self,
        got: npt.NDArray[np.float32],
        was: npt.NDArray[np.float32],
        scaled: npt.NDArray[np.float32],
        tile: slice,
    ) -> npt.NDArray[np.bool_]:
        """For each row, whether all its values pass in float32."""
        error = scaled @ self._product.right[:, tile]
        error += was
        error -= got
        np.abs(error, out=error)
        # Strictly less, so that neither NaN nor infinity passes.
        passed = error < quick_half_ulp(got, self._sources[0][1].dtype)
        return np.asarray(passed.all(axis=1))

    def _judge(
        self,
        got: npt.NDArray[np.float32],
        was: npt.NDArray[np.float32],
        rows: npt.NDArray[np.int64],
        tile: slice,
    ) -> tuple[Wrong | None, Wrong | None]:
        """The bound of the module's docstring, in float64, for some rows of a tile."""
        product = self._product
        left = product.left[rows] * product.scales
        right = product.right[:, tile].astype(np.float64)
        value = got.astype(np.float64)
        expected = was + left @ right
        size = np.abs(left) @ np.abs(right)
        steps = len(product.scales) + product.adapters + 4
        allowed = half_ulp(value, self._sources[0][1].dtype) + UNDERFLOW
        allowed += U * (steps * size + 1.01 * product.adapters * np.abs(was))
        finite = np.isfinite(value)
        # "not within" rather than "beyond": an expected value that is NaN must not pass.
        wrong = finite & ~(np.abs(value - expected) <= allowed)
        tables = value, expected, allowed
        return wrong_values(~finite, rows, tile, *tables), wrong_values(wrong, rows, tile, *tables)


def matrix(entry: TensorEntry) -> tuple[int, int]:
    """Rows and columns of a matrix, or of a vector, which is one column."""
    return (entry.shape[0], 1) if len(entry.shape) == 1 else (entry.shape[0], entry.shape[1])


def read_rows(
    source: Source, entry: TensorEntry, chunk: tuple[int, int], buffer: memoryview
) -> Array:
    """Rows ``chunk[0]`` to ``chunk[1]`` as they are stored."""
    rows, cols = matrix(entry)
    row_bytes, (first, stop) = entry.nbytes // rows, chunk
    raw = source.read(entry.start + first * row_bytes, (stop - first) * row_bytes, buffer)
    return stored(raw, entry.dtype).reshape(stop - first, cols)

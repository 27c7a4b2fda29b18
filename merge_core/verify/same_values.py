"""Whether two stored tensors hold the same values, be their dtypes different."""

from __future__ import annotations

import math

import numpy as np

from merge_core.verify.factors import open_source
from merge_core.verify.reading import Source, new_buffer
from merge_core.verify.rounding import FLOATS, stored, to_float32
from merge_core.verify.weights import BaseTensor

_ELEMENTS = 4 << 20
"""Compared at a time: 16 MB as float32."""


def same_values(one: BaseTensor, two: BaseTensor) -> bool:
    """Whether they do; False for dtypes that no merge computes with.

    Raises:
        InputError: one of them is an adapter's, and broken.
        OSError: one of them cannot be read.
    """
    if one.entry.shape != two.entry.shape or not {one.entry.dtype, two.entry.dtype} <= set(FLOATS):
        return False
    buffer = new_buffer(4 * _ELEMENTS)
    with open_source(one) as first, open_source(two) as second:
        for start in range(0, math.prod(one.entry.shape), _ELEMENTS):
            mine = _values(first, one, start, buffer)
            if not np.array_equal(mine, _values(second, two, start, buffer)):
                return False
    return True


def _values(
    source: Source, tensor: BaseTensor, start: int, buffer: memoryview
) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """A copy of some elements, so that the buffer can be used again."""
    entry, size = tensor.entry, np.dtype(FLOATS[tensor.entry.dtype].storage).itemsize
    first = start * size
    nbytes = min(_ELEMENTS * size, entry.nbytes - first)
    raw = source.read(entry.start + first, nbytes, buffer)
    return to_float32(stored(raw, entry.dtype), entry.dtype).copy()

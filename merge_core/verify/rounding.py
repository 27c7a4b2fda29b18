"""The three float formats that a merge computes with, and what one rounding to them may cost.

BF16 is the upper half of a float32, so numpy handles it as uint16.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class FloatFormat:
    """A binary float format with round-to-nearest-even."""

    storage: str
    """numpy dtype of the stored elements (little-endian)."""
    precision: int
    """Bits of the significand, the implicit one included: ulp(2^e) = 2^(e + 1 - precision)."""
    min_exponent: int
    """Exponent of the smallest normal number; below it the ulp stays the same."""


FLOATS = {
    "BF16": FloatFormat(storage="<u2", precision=8, min_exponent=-126),
    "F16": FloatFormat(storage="<f2", precision=11, min_exponent=-14),
    "F32": FloatFormat(storage="<f4", precision=24, min_exponent=-126),
}

_EXPONENT_BITS = np.uint32(0x7F800000)


def stored(raw: npt.NDArray[np.uint8], dtype: str) -> Array:
    """View bytes as elements in their storage type."""
    return raw.view(FLOATS[dtype].storage)


def to_float32(elements: Array, dtype: str) -> npt.NDArray[np.float32]:
    """Decode stored elements; exact for all three formats."""
    if dtype == "BF16":
        return np.left_shift(elements, 16, dtype=np.uint32).view(np.float32)
    return elements.astype(np.float32)


def from_float32(values: npt.NDArray[np.float32], dtype: str) -> Array:
    """Round float32 values to stored elements, to nearest, ties to even."""
    if dtype != "BF16":
        return values.astype(FLOATS[dtype].storage)
    bits = values.view(np.uint32)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    # A NaN's payload must not carry into the exponent and come out as zero or infinity.
    return np.where(np.isnan(values), bits >> 16 | 0x40, rounded).astype(np.uint16)


def half_ulp(values: npt.NDArray[np.float64], dtype: str) -> npt.NDArray[np.float64]:
    """Half a unit in the last place of each finite value of ``dtype``.

    If x was rounded to w, then |w - x| <= half_ulp(w). (At a power of two the spacing below is
    only half as wide, so this never is too strict.)
    """
    form = FLOATS[dtype]
    # frexp calls zero's exponent 0, as if it were one half.
    exponent = np.where(values == 0, form.min_exponent, np.frexp(values)[1] - 1)
    half: npt.NDArray[np.float64] = np.ldexp(
        1.0, np.maximum(exponent, form.min_exponent) - form.precision
    )
    return half


def quick_half_ulp(values: npt.NDArray[np.float32], dtype: str) -> npt.NDArray[np.float32]:
    """Like ``half_ulp``, in two passes over float32, but too small for subnormals.

    Good for a test that must accept nothing wrong and may send some values on to a better one.
    """
    power = (values.view(np.uint32) & _EXPONENT_BITS).view(np.float32)
    power *= np.float32(2.0 ** -FLOATS[dtype].precision)
    return power

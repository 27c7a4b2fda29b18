"""Tensors that are carried over, from the base or from an adapter that brings them whole: the same
bytes, or the same values in another dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

from merge_core.verify.header import TensorEntry
from merge_core.verify.places import Bytes
from merge_core.verify.reading import Buffers, Lanes, Source
from merge_core.verify.report import Finding, at
from merge_core.verify.rounding import FLOATS, from_float32, stored, to_float32

Place = tuple[Source, TensorEntry]


def check_copied(file: str, out: Place, base: Place, lanes: Lanes, whose: str) -> Iterator[Finding]:
    """Compare every byte of an output tensor with its base tensor of the same size.

    Raises:
        OSError: one of them cannot be read.
    """
    wrong = _first_difference(out, base, 1, 1, lanes, np.not_equal)
    if wrong is not None:
        what = f"byte {wrong} is not {whose}, and nothing else touches this tensor"
        yield Finding(check="copied", where=_where(file, out[1], wrong, 1), what=what)


def check_converted(
    file: str, out: Place, base: Place, lanes: Lanes, whose: str
) -> Iterator[Finding]:
    """Compare every value with the base's value, rounded to nearest even to the output's dtype.

    Both dtypes are in ``FLOATS``. NaN stays NaN, with any payload; a finite value that becomes
    infinite is wrong.

    Raises:
        OSError: one of them cannot be read.
    """
    new, old = out[1].dtype, base[1].dtype

    def differs(got: Bytes, was: Bytes) -> npt.NDArray[np.bool_]:
        source = to_float32(stored(was, old), old)
        value = to_float32(stored(got, new), new)
        with np.errstate(all="ignore"):  # an overflow is a finding, not a warning
            expected = to_float32(from_float32(source, new), new)
        # As bits, because -0.0 == 0.0; the decoding is exact, so nothing else is lost.
        same = value.view(np.uint32) == expected.view(np.uint32)
        same |= np.isnan(value) & np.isnan(expected)
        return np.asarray(~same | (np.isinf(value) & np.isfinite(source)))

    sizes = [np.dtype(FLOATS[dtype].storage).itemsize for dtype in (new, old)]
    wrong = _first_difference(out, base, sizes[0], sizes[1], lanes, differs)
    if wrong is not None:
        what = f"value {wrong} is not {whose} {old} value rounded to {new}"
        yield Finding(check="converted", where=_where(file, out[1], wrong, sizes[0]), what=what)


def _first_difference(
    out: Place,
    base: Place,
    out_size: int,
    base_size: int,
    lanes: Lanes,
    differs: Callable[[Bytes, Bytes], npt.NDArray[np.bool_]],
) -> int | None:
    """Index of the first element for which ``differs`` says so; sizes are bytes an element."""
    count = out[1].nbytes // out_size
    step = lanes.block // max(out_size, base_size)

    def compare(start: int, buffers: Buffers) -> int | None:
        n = min(step, count - start)
        got = out[0].read(out[1].start + start * out_size, n * out_size, buffers[0])
        was = base[0].read(base[1].start + start * base_size, n * base_size, buffers[1])
        places = differs(got, was)
        return start + int(places.argmax()) if places.any() else None

    found = lanes.map(compare, range(0, count, step))
    return next((index for index in list(found) if index is not None), None)


def _where(file: str, entry: TensorEntry, element: int, size: int) -> str:
    if not entry.shape:
        return at(file, entry.name)
    row_bytes = entry.nbytes // entry.shape[0]
    return at(file, entry.name, element * size // row_bytes)

"""The values of packed weights, in numpy, some rows at a time.

Each is worked out from the bits: a code from its place in a word, a float8 from its sign, exponent
and fraction. The products are the formats' own, in float32, rounded once to the weight's dtype:

    gptq, awq    scale * (code - zero); of AWQ's gemv_fast scale * code + (-scale * zero)
    4bit         map[code] * absmax, itself map[code] * absmax + offset where it is nested
    8bit         (code * SCB) * float32(1 / 127)
    fp8          value * scale of its block
    nf4          what bitsandbytes' 4 bits with nested 8-bit absmax would make of an unpacked weight
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from merge_core.verify.places import Bytes, map_range
from merge_core.verify.rounding import FLOATS, Array, from_float32, to_float32
from merge_core.verify.weights import BaseTensor, Packing

Values = npt.NDArray[np.float32]

_AWQ = [0, 4, 1, 5, 2, 6, 3, 7]
"""Places within a word of its eight columns."""


class Unpacked:
    """A packed weight behind the interface of a ``Reader``: as if it lay decoded in a file."""

    def __init__(self, tensor: BaseTensor, packing: Packing) -> None:
        self._entry = tensor.entry
        self._rows = _DECODERS[packing.method](
            {ending: _mapped(part) for ending, part in packing.parts.items()}, packing, tensor
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        """The mapped files are closed with the last reference to them."""

    def read(self, start: int, nbytes: int, buffer: memoryview) -> Bytes:
        """See ``Reader.read``; ``buffer`` is not needed."""
        del buffer
        row_bytes = self._entry.nbytes // self._entry.shape[0]
        top, bottom = start // row_bytes, -(-(start + nbytes) // row_bytes)
        rounded = from_float32(self._rows(top, bottom), self._entry.dtype)
        data: Bytes = np.ascontiguousarray(rounded).reshape(-1).view(np.uint8)
        return data[start - top * row_bytes :][:nbytes]


Rows = Callable[[int, int], Values]
"""Values of rows ``top`` to ``bottom``, in float32, before the rounding."""


def _gptq(parts: Mapping[str, Array], packing: Packing, tensor: BaseTensor) -> Rows:
    bits, size, less = (packing.settings[key] for key in ("bits", "group", "less"))
    zeros = _codes(parts["qzeros"].T, bits).T.astype(np.float32) + np.float32(less)
    scales = _floats(parts, packing, "scales")
    width = tensor.entry.shape[1]
    groups = np.asarray(parts["g_idx"]) if "g_idx" in parts else np.arange(width) // size

    def rows(top: int, bottom: int) -> Values:
        values = _codes(parts["qweight"][:, top:bottom], bits).astype(np.float32)
        values -= zeros[:, top:bottom][groups]
        values *= scales[:, top:bottom][groups]
        return values.T

    return rows


def _awq(parts: Mapping[str, Array], packing: Packing, tensor: BaseTensor) -> Rows:
    groups = np.arange(tensor.entry.shape[1]) // packing.settings["group"]
    scales = _floats(parts, packing, "scales")

    def columns(words: Array) -> Values:
        codes = np.stack([words >> 4 * place & 15 for place in _AWQ], axis=2)
        return codes.reshape(len(words), -1).astype(np.float32)

    zeros = columns(parts["qzeros"])

    def rows(top: int, bottom: int) -> Values:
        first = top // 8
        values = columns(parts["qweight"][:, first : -(-bottom // 8)])
        values = values[:, top - 8 * first : bottom - 8 * first]
        values -= zeros[:, top:bottom][groups]
        values *= scales[:, top:bottom][groups]
        return values.T

    return rows


def _awq_gemv(parts: Mapping[str, Array], packing: Packing, tensor: BaseTensor) -> Rows:
    groups = np.arange(tensor.entry.shape[1]) // packing.settings["group"]
    scales, zeros = _floats(parts, packing, "scales"), _codes(parts["qzeros"].T, 4).T

    def rows(top: int, bottom: int) -> Values:
        values = _codes(parts["qweight"][top:bottom].T, 4).T.astype(np.float32)
        values -= zeros[top:bottom, groups]
        values *= scales[top:bottom, groups]
        return values

    return rows


def _awq_fast(parts: Mapping[str, Array], packing: Packing, tensor: BaseTensor) -> Rows:
    """Word and place of each column are worked out one by one."""
    column = np.arange(tensor.entry.shape[1])
    word = column // 64 * 64 + column % 64 // 32 * 8 + column % 8
    shift = (column % 32 // 8 * 4).astype(np.int16)
    groups = column // packing.settings["group"]
    (name,) = parts.keys() & {"scaled_zeros", "qzeros"}
    scales, zeros = (_floats(parts, packing, part) for part in ("scales", name))

    def rows(top: int, bottom: int) -> Values:
        row = np.arange(top, bottom)[:, None]
        codes = parts["qweight"][row // 4, word + row % 4 * 16] >> shift & 15
        product: Values = codes.astype(np.float32) * scales[groups, row] + zeros[groups, row]
        return product

    return rows


def _four_bit(parts: Mapping[str, Array], packing: Packing, tensor: BaseTensor) -> Rows:
    width, settings = tensor.entry.shape[1], packing.settings
    absmax = np.asarray(parts["weight.absmax"])
    if "nested" in settings:
        blocks = np.arange(len(absmax)) // settings["nested"]
        absmax = np.asarray(parts["weight.nested_quant_map"])[absmax]
        absmax = absmax * np.asarray(parts["weight.nested_absmax"])[blocks]
        absmax = absmax + np.float32(settings["offset"])
    values = np.asarray(parts["weight.quant_map"])
    packed = parts["weight"].reshape(-1).view(np.uint8)

    def rows(top: int, bottom: int) -> Values:
        place = np.arange(top * width, bottom * width)
        codes = np.where(place % 2, packed[place // 2] % 16, packed[place // 2] // 16)
        found: Values = values[codes] * absmax[place // settings["block"]]
        return found.reshape(-1, width)

    return rows


def _int8(parts: Mapping[str, Array], packing: Packing, tensor: BaseTensor) -> Rows:
    del packing, tensor

    def rows(top: int, bottom: int) -> Values:
        product: Values = parts["weight"][top:bottom] * parts["SCB"][top:bottom, None]
        return product * np.float32(1 / 127)

    return rows


def _fp8(parts: Mapping[str, Array], packing: Packing, tensor: BaseTensor) -> Rows:
    width, (high, wide) = tensor.entry.shape[1], packing.settings["block"]
    table, columns = _float8_values(), np.arange(width) // wide
    scale = _floats(parts, packing, "weight_scale_inv").reshape(-1, int(columns[-1]) + 1)

    def rows(top: int, bottom: int) -> Values:
        grid = scale[np.arange(top, bottom) // high]
        product: Values = table[parts["weight"][top:bottom]] * grid[:, columns]
        return product

    return rows


def _nf4(parts: Mapping[str, Array], packing: Packing, tensor: BaseTensor) -> Rows:
    """Blocks of 64 elements, their absmax in blocks of 256 after the mean is taken off."""
    dtype, width = packing.parts["weight"].entry.dtype, tensor.entry.shape[1]
    flat = parts["weight"].reshape(-1)
    steps = range(0, len(flat), 1 << 20)
    peaks = [
        np.abs(to_float32(flat[step : step + (1 << 20)], dtype)).reshape(-1, 64).max(axis=1)
        for step in steps
    ]
    absmax = np.concatenate(peaks)
    mean = np.float32(absmax.mean(dtype=np.float64))
    outer = np.maximum.reduceat(np.abs(absmax - mean), np.arange(0, len(absmax), 256))
    outer = outer.repeat(256)[: len(absmax)]
    unit = (absmax - mean) * (np.float32(1) / np.maximum(outer, _TINY))
    nested = _nearest(unit.astype(np.float32), _dynamic_map()) * outer + mean

    def rows(top: int, bottom: int) -> Values:
        first, behind = top * width // 64, -(-bottom * width // 64)
        blocks = to_float32(flat[first * 64 : behind * 64], dtype).reshape(-1, 64)
        unit = blocks * (np.float32(1) / np.maximum(absmax[first:behind], _TINY))[:, None]
        values = _nearest(unit, _NF4) * nested[first:behind, None]
        values = values.reshape(-1)[top * width - first * 64 :][: (bottom - top) * width]
        return values.reshape(-1, width)

    return rows


_TINY = np.float32(1e-38)

_NF4 = np.array(
    [
        *(-1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.091050036, 0.0),
        *(0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0),
    ],
    np.float32,
)


def _dynamic_map() -> Values:
    """Zero, one, and in each power of ten from 1e-6 to 1 the middles of 2^k equal parts of the
    upper nine tenths, with both signs.
    """
    values = [np.array([0.0, 1.0])]
    for power in range(7):
        border = np.linspace(0.1, 1.0, 2**power + 1)
        middle = (border[:-1] + border[1:]) / 2 * 10.0 ** (power - 6)
        values += [middle, -middle]
    return np.sort(np.concatenate(values)).astype(np.float32)


def _nearest(numbers: Values, table: Values) -> Values:
    """The nearest values of a sorted table; of two as near, the lower one."""
    found: Values = table[np.searchsorted((table[:-1] + table[1:]) / np.float32(2), numbers)]
    return found


_DECODERS = {
    "gptq": _gptq, "awq": _awq, "awq gemv": _awq_gemv, "awq gemv_fast": _awq_fast,
    "4bit": _four_bit, "8bit": _int8, "fp8": _fp8, "nf4": _nf4,
}  # fmt: skip


def _codes(words: Array, bits: int) -> npt.NDArray[np.uint8]:
    """[words, columns] to the numbers in each column, from the lowest bit of the first word on."""
    columns = words.shape[1]
    if 32 % bits == 0:
        places = [words >> shift & (1 << bits) - 1 for shift in range(0, 32, bits)]
        return np.stack(places, axis=1).astype(np.uint8).reshape(-1, columns)
    raw = np.ascontiguousarray(words.T).view(np.uint8)
    single = np.unpackbits(raw, axis=1, bitorder="little").reshape(columns, -1, bits)
    return np.packbits(single, axis=2, bitorder="little")[..., 0].T


def _float8_values() -> Values:
    """Of each byte of E4M3 without infinities: bias 7, 127 and 255 are NaN."""
    code = np.arange(256)
    exponent, fraction = code >> 3 & 15, code & 7
    size = np.where(
        exponent == 0, fraction * 2.0**-9, (8 + fraction) * 2.0 ** (exponent.astype(float) - 10)
    )
    size[code & 127 == 127] = np.nan
    signed: Values = np.where(code > 127, -size, size).astype(np.float32)
    return signed


def _floats(parts: Mapping[str, Array], packing: Packing, ending: str) -> Values:
    return to_float32(np.asarray(parts[ending]), packing.parts[ending].entry.dtype)


_STORAGE = {
    **{name: form.storage for name, form in FLOATS.items()},
    "I32": "<i4",
    "I16": "<i2",
    "I8": "i1",
}


def _mapped(part: BaseTensor) -> Any:
    """The stored elements, of what has no numpy dtype the bytes."""
    entry = part.entry
    raw = map_range(part.path, entry.start, entry.nbytes)
    dtype = _STORAGE.get(entry.dtype)
    if dtype is None and entry.nbytes != np.prod(entry.shape):
        return raw
    return (raw if dtype is None else raw.view(dtype)).reshape(entry.shape)

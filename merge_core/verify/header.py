"""The header of a safetensors file, read strictly.

A file is: u64 n (little-endian), n bytes of JSON, tensor data. The JSON maps a name to
``{"dtype", "shape", "data_offsets": [begin, end]}``, with offsets counted from the start of the
data; ``__metadata__`` maps strings to strings. The rules are those of safetensors' own
``tensor.rs``, plus one: a repeated key, which safetensors accepts, is an error here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from merge_core.stores.location import Location
from merge_core.verify.places import HEAD_BYTES, read_head, read_range
from merge_core.verify.strict_json import MalformedError, parse_object

MAX_HEADER_BYTES = 100_000_000
"""safetensors reads no longer header."""

DTYPE_BITS: Mapping[str, int] = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 8),
    **dict.fromkeys(("F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("C64", "F64", "I64", "U64"), 64),
}
"""Bits of one element, for each dtype of safetensors 0.8."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorEntry:
    """One tensor of one file."""

    name: str
    dtype: str
    """Name in safetensors' spelling, such as ``BF16``."""
    shape: tuple[int, ...]
    start: int
    """Offset of its first byte, from the start of the file."""
    nbytes: int
    """Size of its data in bytes."""


def read_header(file: Location) -> tuple[TensorEntry, ...]:
    """Tensors of ``file``, in the order of their data.

    Raises:
        MalformedError: the header lies or the size of the file does not fit it.
        OSError: the file cannot be read.
    """
    head, size = read_head(file, HEAD_BYTES)
    length = int.from_bytes(head[:8], "little")
    # A lying length must not make us read (or allocate) more than the file has.
    if len(head) - 8 < length <= min(MAX_HEADER_BYTES, size - 8):
        head += read_range(file, len(head), 8 + length - len(head)).tobytes()
    return parse_header(head, size)


def parse_header(head: bytes, file_size: int) -> tuple[TensorEntry, ...]:
    """Tensors that ``head`` (length and JSON, or more) declares for a file of ``file_size`` bytes.

    Raises:
        MalformedError: with the first rule that is broken.
    """
    if file_size < 8 or len(head) < 8:
        raise MalformedError(f"the file has {file_size} bytes, its header alone needs 8")
    length = int.from_bytes(head[:8], "little")
    if length > min(MAX_HEADER_BYTES, file_size - 8):
        raise MalformedError(f"it declares a header of {length} bytes, the file has {file_size}")
    document = parse_object(head[8 : 8 + length])
    _check_metadata(document.pop("__metadata__", None))
    entries = sorted(_entries(document), key=lambda entry: (entry.start, entry.nbytes))
    _check_gapless(entries, file_size - 8 - length)
    return tuple(replace(entry, start=8 + length + entry.start) for entry in entries)


def _check_metadata(metadata: object) -> None:
    if metadata is None:
        return
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise MalformedError("__metadata__ maps something else than strings to strings")


def _entries(document: dict[str, Any]) -> Iterator[TensorEntry]:
    """Entries with ``start`` still counted from the start of the data."""
    for name, value in document.items():
        if not isinstance(value, dict):
            raise MalformedError(f"tensor {name!r} has no description")
        fields: tuple[Any, ...] = tuple(map(value.get, ("dtype", "shape", "data_offsets")))
        dtype, shape, offsets = fields
        if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
            raise MalformedError(f"tensor {name!r} has unknown dtype {dtype!r}")
        if not _are_sizes(shape):
            raise MalformedError(f"tensor {name!r} has shape {shape!r}")
        if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
            raise MalformedError(f"tensor {name!r} has data_offsets {offsets!r}")
        nbytes, bits = offsets[1] - offsets[0], math.prod(shape) * DTYPE_BITS[dtype]
        if bits != 8 * nbytes:
            what = f"has {nbytes} bytes, {dtype} {shape} needs {bits / 8:g}"
            raise MalformedError(f"tensor {name!r} {what}")
        yield TensorEntry(
            name=name, dtype=dtype, shape=tuple(shape), start=offsets[0], nbytes=nbytes
        )


def _are_sizes(values: Any) -> bool:
    """Whether ``values`` is a list of integers that fit u64 (``True`` is none)."""
    return isinstance(values, list) and all(type(v) is int and 0 <= v < 2**64 for v in values)


def _check_gapless(entries: list[TensorEntry], data_bytes: int) -> None:
    """Each tensor begins where the one before ends, and the last one ends with the file."""
    end = 0
    for entry in entries:
        if entry.start != end:
            kind = "a hole" if entry.start > end else "an overlap"
            raise MalformedError(f"{kind} before tensor {entry.name!r}, at data byte {end}")
        end += entry.nbytes
    if end != data_bytes:
        raise MalformedError(f"the tensors end at data byte {end}, the file at {data_bytes}")

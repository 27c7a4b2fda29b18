"""The safetensors header: read strictly, and laid out so that tensor data is page aligned.

A file is ``u64 little-endian n``, n bytes of JSON, then the data. The reader here refuses what
the reference reader refuses (holes, overlaps, wrong sizes) and also duplicate JSON keys, which
the reference accepts with the last one winning: a lying header must not decide what is merged.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from merge_core.errors import InputError, Problem, refuse, shortened
from merge_core.json_text import parse_object

ALIGNMENT = 4096
"""Page size that direct I/O asks for: data starts at a multiple, big tensors stay on one."""

MAX_HEADER_BYTES = 100_000_000
"""The format's own limit; a longer header is an attack or a broken file, never a model."""

DTYPE_BYTES: Mapping[str, int] = MappingProxyType(
    {
        **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 1),
        **dict.fromkeys(("F8_E4M3FNUZ", "F8_E5M2FNUZ"), 1),
        **dict.fromkeys(("I16", "U16", "F16", "BF16"), 2),
        **dict.fromkeys(("I32", "U32", "F32"), 4),
        **dict.fromkeys(("C64", "F64", "I64", "U64"), 8),
    }
)
"""Bytes an element. The sub-byte dtypes (F4, F6) are packed formats of quantised models."""

DTYPE_NAMES: Mapping[str, str] = MappingProxyType(
    {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
)
"""Of the dtypes that weights can have, as config.json and --dtype spell them."""

MERGEABLE = frozenset(DTYPE_NAMES.values())
"""Dtypes that can take a delta, or be one, or be converted."""

_MAX_DIMENSIONS = 64
"""Torch works with no more."""

_TOO_MUCH = 1 << 63
"""Neither a file nor a tensor has that many bytes; Python would count on, for minutes."""

_REPAIR = "Fetch the file again; it is damaged or was not written by safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """One tensor of a safetensors file."""

    name: str
    dtype: str
    """safetensors name, such as ``BF16``."""
    shape: tuple[int, ...]
    offset: int
    """First byte, counted from the start of the file."""
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FileLayout:
    """Where everything lies in a file that is to be written."""

    header: bytes
    """Length prefix and padded JSON: the file's first bytes."""
    tensors: tuple[TensorSpec, ...]
    """In file order."""
    size: int


def header_length(prefix: bytes, file_size: int, where: str) -> int:
    """Bytes of the JSON that follows the 8-byte ``prefix``.

    Raises:
        InputError: the file is too short for a header, or the length is a lie.
    """
    if len(prefix) < 8:
        raise refuse(f"{file_size} bytes are too few for a safetensors file", where, _REPAIR)
    length = int.from_bytes(prefix[:8], "little")
    if length > MAX_HEADER_BYTES:
        raise refuse(f"header of {length} bytes exceeds the format's 100 MB limit", where, _REPAIR)
    if 8 + length > file_size:
        raise refuse(
            f"truncated: the header ends at byte {8 + length}, the file at {file_size}",
            where,
            _REPAIR,
        )
    return length


def parse_header(text: bytes, file_size: int, where: str) -> tuple[TensorSpec, ...]:
    """The tensors that the header's JSON ``text`` describes, in file order.

    Args:
        text: the JSON, without the 8-byte prefix.
        file_size: size of the whole file in bytes, against which the offsets are checked.
        where: the file's name, for messages.

    Raises:
        InputError: with every problem of this header.
    """
    fields = parse_object(text, f"{where}, header", _REPAIR)
    problems: list[Problem] = []
    metadata = fields.pop("__metadata__", None)
    if metadata is not None and not _is_text_map(metadata):
        problems.append(Problem("__metadata__ is not a map of strings", where, _REPAIR))
    data_start = 8 + len(text)
    tensors = [_tensor(name, entry, data_start, where, problems) for name, entry in fields.items()]
    found = sorted((t for t in tensors if t is not None), key=lambda t: (t.offset, t.nbytes))
    if not problems:
        _check_coverage(found, data_start, file_size, where, problems)
    if problems:
        raise InputError(problems)
    return tuple(found)


def lay_out(tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> FileLayout:
    """Header and offsets of a file that holds ``tensors`` given as (name, dtype, shape).

    Tensors whose size is a multiple of the page come first, in the order given, so each of them
    starts on a page; the others follow, wide elements before narrow ones so that each is aligned to
    its own size, and large before small. Deterministic: one metadata key only,
    since readers print several in any order.
    """
    sized = [(name, dtype, shape, tensor_bytes(dtype, shape)) for name, dtype, shape in tensors]
    whole_pages = [t for t in sized if t[3] % ALIGNMENT == 0]
    odd = sorted((t for t in sized if t[3] % ALIGNMENT), key=lambda t: (-DTYPE_BYTES[t[1]], -t[3]))
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, dtype, shape, nbytes in whole_pages + odd:
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + nbytes]}
        end += nbytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    start = 8 + len(text)
    placed = tuple(
        TensorSpec(
            name=name,
            dtype=dtype,
            shape=shape,
            offset=start + entries[name]["data_offsets"][0],
            nbytes=nbytes,
        )
        for name, dtype, shape, nbytes in whole_pages + odd
    )
    return FileLayout(
        header=len(text).to_bytes(8, "little") + text, tensors=placed, size=start + end
    )


def tensor_bytes(dtype: str, shape: Iterable[int]) -> int:
    """Size in bytes of a tensor; ``dtype`` must be one of DTYPE_BYTES."""
    return math.prod(shape) * DTYPE_BYTES[dtype]


def _tensor(
    name: str, entry: Any, data_start: int, where: str, problems: list[Problem]
) -> TensorSpec | None:
    at = f"{where}, tensor {name!r}"
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        problems.append(Problem("entry lacks dtype, shape or data_offsets", at, _REPAIR))
        return None
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        problems.append(
            Problem(
                f"dtype {shortened(dtype)} is not one that raymeld can read",
                at,
                "Use a checkpoint in bf16, fp16 or fp32",
            )
        )
        return None
    if not _is_naturals(shape) or not _is_naturals(offsets) or len(offsets) != 2:
        problems.append(Problem("shape or data_offsets are not natural numbers", at, _REPAIR))
        return None
    begin, end = offsets
    nbytes = tensor_bytes(dtype, shape)
    if end - begin != nbytes:
        takes = nbytes if nbytes < _TOO_MUCH else "too many"
        problems.append(
            Problem(
                f"{dtype} {shape} takes {takes} bytes, its offsets hold {end - begin}",
                at,
                _REPAIR,
            )
        )
        return None
    return TensorSpec(
        name=name, dtype=dtype, shape=tuple(shape), offset=data_start + begin, nbytes=end - begin
    )


def _check_coverage(
    found: list[TensorSpec], data_start: int, file_size: int, where: str, problems: list[Problem]
) -> None:
    end = data_start
    for tensor in found:
        if tensor.offset != end:
            kind = "overlaps the tensor before it" if tensor.offset < end else "leaves a hole"
            problems.append(
                Problem(
                    f"starts at byte {tensor.offset} instead of {end} and {kind}",
                    f"{where}, tensor {tensor.name!r}",
                    _REPAIR,
                )
            )
        end = max(end, tensor.offset + tensor.nbytes)
    if end != file_size:
        kind = "truncated" if file_size < end else "trailing bytes"
        problems.append(
            Problem(f"{kind}: data ends at byte {end}, the file at {file_size}", where, _REPAIR)
        )


def _is_naturals(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) <= _MAX_DIMENSIONS
        and all(type(v) is int and 0 <= v < _TOO_MUCH for v in value)
    )


def _is_text_map(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(v, str) for v in value.values())

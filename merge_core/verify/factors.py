"""The weights file of an adapter: shapes first, float32 matrices on demand."""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from merge_core.errors import refuse
from merge_core.stores.location import Location
from merge_core.verify.header import TensorEntry, read_header
from merge_core.verify.places import Bytes, exists, map_range, read_bytes, read_range
from merge_core.verify.reading import Mapped, Source, open_reader
from merge_core.verify.rounding import FLOATS, stored, to_float32
from merge_core.verify.strict_json import MalformedError
from merge_core.verify.unpacking import Unpacked
from merge_core.verify.weights import BaseTensor

Matrix = npt.NDArray[np.float32]
_KEPT = 4
"""A and B of both parameters that hold the experts of a layer."""

_REMEDY = "Check without --level numeric, or with the adapter that was merged"


@dataclass(frozen=True, slots=True, kw_only=True)
class Factors:
    """An opened weights file of an adapter."""

    path: Location
    shapes: Mapping[str, tuple[int, ...]]
    """Key to shape."""
    tensor: Callable[[str], BaseTensor]
    """Where the tensor of a key lies; in a ``.bin``, as if it were alone in there."""
    read: Callable[[str], Matrix]
    """Tensor of a key, converted to float32 (exact: only BF16, F16 and F32 are accepted)."""
    recall: Callable[[str], Matrix]
    """The same, of tensors that many others need too: the last few are kept."""
    mapped: Callable[[str], Bytes]
    """The bytes of a key's tensor, mapped where that is possible."""


def weights_path(adapter: Location) -> Location:
    """The weights file in the adapter's folder; safetensors win, as in PEFT.

    Raises:
        InputError: there is none.
    """
    for name in ("adapter_model.safetensors", "adapter_model.bin"):
        if exists(adapter / name):
            return adapter / name
    raise refuse("it holds no adapter_model.safetensors or .bin", str(adapter), _REMEDY)


def open_factors(path: Location, *, any_dtype: bool = False) -> Factors:
    """Open an adapter's weights file; a ``.bin`` is unpickled (tensors only) and mapped.

    Args:
        any_dtype: of no tensor more than the name is asked for.

    Raises:
        InputError: it is broken, or holds a dtype that is not BF16, F16 or F32.
    """
    try:
        opened, dtypes = _pickled(path) if path.name.endswith(".bin") else _safetensors(path)
    except (MalformedError, OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise refuse(
            f"the adapter's weights cannot be read ({error})", str(path), _REMEDY
        ) from error
    if not any_dtype:
        _refuse_dtypes(path, dtypes)
    return opened


def open_source(tensor: BaseTensor) -> Source:
    """Opens the file of a tensor, be it one of the base or of an adapter.

    Raises:
        InputError: it is an adapter's, and broken.
        OSError: it cannot be opened.
    """
    if tensor.packing is not None:
        return Unpacked(tensor, tensor.packing)
    if tensor.path.name.endswith(".bin"):
        return Mapped(_pickled(tensor.path)[0].mapped(tensor.entry.name))
    return open_reader(tensor.path)


def _safetensors(path: Location) -> tuple[Factors, dict[str, str]]:
    """The file, and the dtype of each tensor."""
    entries: dict[str, TensorEntry] = {entry.name: entry for entry in read_header(path)}

    def read(name: str) -> Matrix:
        entry = entries[name]
        raw = read_range(path, entry.start, entry.nbytes)
        return to_float32(stored(raw, entry.dtype), entry.dtype).reshape(entry.shape)

    def tensor(name: str) -> BaseTensor:
        return BaseTensor(path=path, entry=entries[name])

    def mapped(name: str) -> Bytes:
        entry = entries[name]
        return map_range(path, entry.start, entry.nbytes)

    shapes = {name: entry.shape for name, entry in entries.items()}
    recall = lru_cache(_KEPT)(read)
    opened = Factors(
        path=path, shapes=shapes, tensor=tensor, read=read, recall=recall, mapped=mapped
    )
    return opened, {name: entry.dtype for name, entry in entries.items()}


def _pickled(path: Location) -> tuple[Factors, dict[str, str]]:
    """The file, and the dtype of each tensor."""
    import torch  # only for this old format; verify runs without torch otherwise

    # Files from before torch 1.6 are no zip archives and cannot be mapped.
    file = path.local if path.is_local else io.BytesIO(read_bytes(path))
    mapped = path.is_local and zipfile.is_zipfile(path.local)
    tensors: Any = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    if not isinstance(tensors, dict) or not all(map(torch.is_tensor, tensors.values())):
        raise MalformedError("it holds something else than a dictionary of tensors")
    tensors = {name: tensor.detach() for name, tensor in tensors.items()}
    names = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
    dtypes = {key: names.get(held.dtype, str(held.dtype)) for key, held in tensors.items()}

    def read(name: str) -> Matrix:
        matrix: Matrix = tensors[name].to(torch.float32).resolve_neg().numpy()
        return matrix

    def tensor(name: str) -> BaseTensor:
        held = tensors[name]
        entry = TensorEntry(
            name=name,
            dtype=dtypes[name],
            shape=tuple(held.shape),
            start=0,
            nbytes=held.numel() * held.element_size(),
        )
        return BaseTensor(path=path, entry=entry)

    def bytes_of(name: str) -> Bytes:
        held = tensors[name].resolve_neg().reshape(-1).contiguous()
        data: Bytes = held.view(torch.uint8).numpy()
        return data

    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    recall = lru_cache(_KEPT)(read)
    opened = Factors(
        path=path, shapes=shapes, tensor=tensor, read=read, recall=recall, mapped=bytes_of
    )
    return opened, dtypes


def _refuse_dtypes(path: Location, dtypes: Mapping[str, str]) -> None:
    for name, dtype in dtypes.items():
        if dtype not in FLOATS:
            what = f"it cannot check tensor {name!r} of dtype {dtype}"
            raise refuse(what, str(path), _REMEDY)

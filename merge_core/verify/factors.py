"""The weights file of an adapter: shapes first, float32 matrices on demand."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from merge_core.errors import refuse
from merge_core.verify.header import TensorEntry, read_header
from merge_core.verify.reading import Bytes, Mapped, Reader, Source
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

    path: str
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


def weights_path(adapter: Path) -> Path:
    """The weights file in the adapter's directory; safetensors win, as in PEFT.

    Raises:
        InputError: there is none.
    """
    for name in ("adapter_model.safetensors", "adapter_model.bin"):
        if (adapter / name).is_file():
            return adapter / name
    raise refuse("it holds no adapter_model.safetensors or .bin", str(adapter), _REMEDY)


def open_factors(path: str, *, any_dtype: bool = False) -> Factors:
    """Open an adapter's weights file; a ``.bin`` is unpickled (tensors only) and mapped.

    Args:
        any_dtype: of no tensor more than the name is asked for.

    Raises:
        InputError: it is broken, or holds a dtype that is not BF16, F16 or F32.
    """
    try:
        opened, dtypes = _pickled(path) if path.endswith(".bin") else _safetensors(path)
    except (MalformedError, OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise refuse(f"the adapter's weights cannot be read ({error})", path, _REMEDY) from error
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
    if tensor.path.endswith(".bin"):
        return Mapped(_pickled(tensor.path)[0].mapped(tensor.entry.name))
    return Reader(tensor.path)


def _safetensors(path: str) -> tuple[Factors, dict[str, str]]:
    """The file, and the dtype of each tensor."""
    entries: dict[str, TensorEntry] = {entry.name: entry for entry in read_header(Path(path))}

    def read(name: str) -> Matrix:
        entry = entries[name]
        raw = np.fromfile(path, np.uint8, entry.nbytes, offset=entry.start)
        return to_float32(stored(raw, entry.dtype), entry.dtype).reshape(entry.shape)

    def tensor(name: str) -> BaseTensor:
        return BaseTensor(path=path, entry=entries[name])

    def mapped(name: str) -> Bytes:
        entry = entries[name]
        return np.memmap(path, np.uint8, "r", offset=entry.start, shape=(entry.nbytes,))

    shapes = {name: entry.shape for name, entry in entries.items()}
    recall = lru_cache(_KEPT)(read)
    opened = Factors(
        path=path, shapes=shapes, tensor=tensor, read=read, recall=recall, mapped=mapped
    )
    return opened, {name: entry.dtype for name, entry in entries.items()}


def _pickled(path: str) -> tuple[Factors, dict[str, str]]:
    """The file, and the dtype of each tensor."""
    import torch  # only for this old format; verify runs without torch otherwise

    # Files from before torch 1.6 are no zip archives and cannot be mapped.
    mapped = zipfile.is_zipfile(path)
    tensors: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
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


def _refuse_dtypes(path: str, dtypes: Mapping[str, str]) -> None:
    for name, dtype in dtypes.items():
        if dtype not in FLOATS:
            what = f"it cannot check tensor {name!r} of dtype {dtype}"
            raise refuse(what, path, _REMEDY)

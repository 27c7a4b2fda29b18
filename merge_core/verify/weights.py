"""Which files of a checkpoint hold which tensors: the index, and the tensors of a base."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from merge_core.errors import refuse
from merge_core.stores.location import Location
from merge_core.verify.header import TensorEntry, read_header
from merge_core.verify.places import exists, read_bytes
from merge_core.verify.strict_json import MalformedError, parse_object

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightIndex:
    """The content of a ``model.safetensors.index.json``."""

    weight_map: dict[str, str]
    """Tensor to file name."""
    total_size: int | None
    """``metadata.total_size``, in bytes of tensor data; None if it is not there."""

    @property
    def files(self) -> tuple[str, ...]:
        """The files it names, sorted."""
        return tuple(sorted(set(self.weight_map.values())))


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseTensor:
    """A tensor of the base and the file that holds it."""

    path: Location
    entry: TensorEntry
    """Of one that is packed, what it decodes to."""
    packing: Packing | None = None
    """What it is decoded from; then ``path`` is only where one of these lies."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Packing:
    """The stored parts of a packed weight, and how they are read. Tuples, since a check that is
    sent to a worker is looked up by its value.
    """

    method: str
    stored: tuple[tuple[str, BaseTensor], ...]
    """By what stands behind the module's path."""
    said: tuple[tuple[str, Any], ...] = ()
    """Sizes that the method needs, by name."""

    @property
    def parts(self) -> Mapping[str, BaseTensor]:
        """``stored``, to be looked up."""
        return dict(self.stored)

    @property
    def settings(self) -> Mapping[str, Any]:
        """``said``, to be looked up."""
        return dict(self.said)


def read_index(file: Location) -> WeightIndex:
    """Read an index file.

    Raises:
        MalformedError: it is no index, or names a file outside its own folder.
        OSError: it cannot be read.
    """
    document = parse_object(read_bytes(file))
    weight_map, metadata = document.get("weight_map"), document.get("metadata", {})
    if not isinstance(weight_map, dict) or not isinstance(metadata, dict):
        raise MalformedError("it has no weight_map")
    for tensor, home in weight_map.items():
        if not isinstance(home, str) or not is_plain_name(home):
            raise MalformedError(f"tensor {tensor!r} lies in {home!r}, which is no file name")
    total = metadata.get("total_size")
    return WeightIndex(weight_map=weight_map, total_size=total if type(total) is int else None)


def is_plain_name(name: str) -> bool:
    """Whether ``name`` is a ``.safetensors`` file of the folder itself, not a path out of it."""
    return PurePath(name).name == name and name.endswith(".safetensors") and "\0" not in name


def open_base(folder: Location) -> dict[str, BaseTensor]:
    """All tensors of the base in ``folder``, from its headers.

    A single file wins over an index, as in transformers.

    Raises:
        InputError: it is no safetensors checkpoint, so nothing can be compared with it.
    """
    remedy = "Name the base that was merged with --base"
    tensors: dict[str, BaseTensor] = {}
    path = folder / SINGLE
    try:
        files = (SINGLE,) if exists(path) else read_index(path := folder / INDEX).files
        for file in files:
            path = folder / file
            for entry in read_header(path):
                found = BaseTensor(path=path, entry=entry)
                if tensors.setdefault(entry.name, found) is not found:
                    raise refuse(f"tensor {entry.name!r} is in two files", str(path), remedy)
    except MalformedError as error:
        raise refuse(f"the base is broken: {error}", str(path), remedy) from error
    except OSError as error:
        raise refuse(f"no base: {error.strerror or error}", str(path), remedy) from error
    return tensors

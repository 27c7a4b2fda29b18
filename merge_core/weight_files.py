"""The safetensors files of a checkpoint: which there are, and what their headers say."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import PurePath

from merge_core.digest import bytes_digest
from merge_core.errors import InputError, Problem, StorageError, gathered, refuse
from merge_core.folders import read_json, refused
from merge_core.layout import TensorSpec, header_length, parse_header
from merge_core.side_files import INDEX
from merge_core.stores.location import Location
from merge_core.stores.opening import open_store
from merge_core.stores.store import FileIdentity

SINGLE = "model.safetensors"

HEAD_BYTES = 100_000
"""Read of a file in a store at first: most headers are shorter, and a second request costs more
than these bytes."""

_FETCH = "Fetch the checkpoint again; it is incomplete"


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightFile:
    """One safetensors file."""

    identity: FileIdentity
    header_digest: str
    tensors: tuple[TensorSpec, ...]


def read_header(folder: Location, name: str) -> WeightFile:
    """Open one safetensors file.

    Raises:
        InputError: it cannot be read, or its header is damaged or lies.
    """
    store, where = open_store(folder), str(folder / name)
    try:
        identity = store.look(name)
        with closing(store.open(identity)) as reader:
            first = 8 if folder.is_local else HEAD_BYTES
            head = bytes(reader.read(0, min(first, identity.size)))
            end = 8 + header_length(head[:8], identity.size, where)
            if end > len(head):
                head += bytes(reader.read(len(head), end - len(head)))
    except StorageError as error:
        raise refused(error) from error
    return WeightFile(
        identity=identity,
        header_digest=bytes_digest(head[:end]),
        tensors=parse_header(head[8:end], identity.size, where),
    )


def open_weight_files(
    folder: Location, names: Collection[str], notes: list[str]
) -> tuple[WeightFile, ...]:
    """Open the files that the index names, or the only one.

    Args:
        names: of all files there.
        notes: takes what the user should know.

    Raises:
        InputError: with every problem of index and headers.
    """
    present = sorted(name for name in names if name.endswith(".safetensors") and "/" not in name)
    indexed, single = INDEX in names, SINGLE in present
    if indexed and single:
        raise refuse(
            f"holds both {SINGLE} and {INDEX}, and loaders disagree on which one counts",
            str(folder),
            "Remove the one that is stale",
        )
    if not indexed and not single:
        raise _no_weights(folder, names, present)
    weight_map = _weight_map(folder) if indexed else {}
    wanted = sorted(set(weight_map.values())) if indexed else [SINGLE]
    notes += [
        f"{name} is not named by the index and is left out, as loaders do"
        for name in sorted(set(present) - set(wanted))
    ]
    problems: list[Problem] = []
    files: list[WeightFile] = []
    for name in wanted:
        with gathered(problems):
            if name not in present:
                raise refuse(f"the index names {name!r}, which is missing", str(folder), _FETCH)
            files.append(read_header(folder, name))
    if not problems:
        problems += _contradictions(files, weight_map, folder)
    if problems:
        raise InputError(problems)
    return tuple(files)


def _no_weights(folder: Location, names: Collection[str], present: list[str]) -> InputError:
    if any(name.startswith("pytorch_model") and name.endswith(".bin") for name in names):
        return refuse(
            "the base is in pytorch_model*.bin, which raymeld does not read",
            str(folder),
            "Save it once more with transformers: save_pretrained writes safetensors",
        )
    what = f"neither {SINGLE} nor {INDEX}" + (f", only {', '.join(present[:3])}" if present else "")
    return refuse(f"no weights found: {what}", str(folder), _FETCH)


def _weight_map(folder: Location) -> dict[str, str]:
    where = str(folder / INDEX)
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise refuse("weight_map is missing or empty", where, _FETCH)
    problems = [
        Problem(f"weight_map puts {name!r} into {file!r}, outside the checkpoint", where, _FETCH)
        for name, file in weight_map.items()
        if not isinstance(file, str) or PurePath(file).name != file or file in ("", ".", "..")
    ]
    if problems:
        raise InputError(problems)
    return weight_map


def _contradictions(
    files: list[WeightFile], weight_map: dict[str, str], folder: Location
) -> Iterator[Problem]:
    """Every tensor lies in exactly one file, and the index says in which."""
    home: dict[str, str] = {}
    for file in files:
        for tensor in file.tensors:
            here = file.identity.name
            if tensor.name in home:
                what = f"tensor {tensor.name!r} is in {home[tensor.name]} and in {here}"
                yield Problem(what, str(folder), _FETCH)
            elif weight_map and weight_map.get(tensor.name) != here:
                said = weight_map.get(tensor.name, "no file")
                what = f"tensor {tensor.name!r} is in {here}, the index says {said}"
                yield Problem(what, str(folder / INDEX), _FETCH)
            home[tensor.name] = here
    for name in sorted(weight_map.keys() - home.keys()):
        what = f"tensor {name!r} is not in {weight_map[name]}, where the index puts it"
        yield Problem(what, str(folder / INDEX), _FETCH)

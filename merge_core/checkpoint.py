"""A base checkpoint, opened from its config, its index and its headers: no tensor is read."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merge_core.architecture import HEAD, check_architecture
from merge_core.decoding.stored import Stored
from merge_core.digest import bytes_digest
from merge_core.errors import InputError, Problem, gathered, refuse
from merge_core.json_text import parse_object
from merge_core.layout import TensorSpec, header_length, parse_header
from merge_core.plan import SideFile, Source, StoredHead
from merge_core.quantised import (
    Decodings,
    Read,
    decoded_tensor,
    quantisation_of,
    refuse_packed,
)
from merge_core.side_files import CONFIG, INDEX, descriptions, find_side_files
from merge_core.storage import FileIdentity, reported
from merge_core.stored_head import NOTE, find_stored_head

SINGLE = "model.safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightFile:
    """One safetensors file of the base."""

    identity: FileIdentity
    header_digest: str
    tensors: tuple[TensorSpec, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """What a base checkpoint consists of."""

    path: Path
    config: Mapping[str, Any]
    files: tuple[WeightFile, ...]
    side_files: tuple[SideFile, ...]
    """Carried over byte for byte: tokenizer, generation config, chat template, licence, ..."""
    notes: tuple[str, ...]
    """What the user should know, though nothing is wrong."""
    decodings: Decodings | None = None
    """Of which weights others come out; None: of none."""
    stored_head: StoredHead | None = None
    """A head that repeats the embeddings, to which it is tied; None: there is none."""

    @property
    def sources(self) -> Mapping[str, Source]:
        """Its tensors as a merge starts from them, by name: packed ones as they come out, tied
        ones once.
        """
        sources = dict(_sources(self.files, self.decodings))
        if self.stored_head is not None:
            del sources[HEAD]
        return sources


Decode = Callable[[Mapping[str, Any], Sequence[Stored], Read, str], Decodings]
"""Finds the weights that are decoded, see ``quantised.read_packed``."""


def open_checkpoint(path: Path, decode: Decode | None = None) -> Checkpoint:
    """Open the checkpoint in directory ``path``.

    Args:
        decode: finds the weights that are not taken as they are.

    Raises:
        InputError: with every problem found in config, index and headers.
    """
    _refuse_other_directories(path)
    problems: list[Problem] = []
    config: dict[str, Any] | None = None
    files: tuple[WeightFile, ...] = ()
    notes: list[str] = []
    with gathered(problems):
        config = read_json(path / CONFIG)
        if decode is None:
            refuse_packed(config, str(path / CONFIG))
    with gathered(problems):
        files = _open_weight_files(path, notes)
    quantised = config is not None and quantisation_of(config) is not None
    decodings: Decodings | None = None
    stored_head: StoredHead | None = None
    if config is not None and files and (decode is not None or not quantised):
        with gathered(problems):
            if not quantised:
                _refuse_undescribed(path, files)
            if decode is not None:
                decodings = _decodings(path, config, files, decode)
                notes += decodings.notes
            sources = dict(_sources(files, decodings))
            shapes = {name: source.tensor.shape for name, source in sources.items()}
            notes += check_architecture(config, shapes, str(path))
            stored_head = find_stored_head(config, sources, str(path))
            notes += [NOTE] * (stored_head is not None)
    side_files: tuple[SideFile, ...] = ()
    with gathered(problems):
        side_files = find_side_files(path, quantised=quantised)
    if problems or config is None:
        raise InputError(problems)
    if quantised:
        notes += [f"{name} is left out: it describes packed weights" for name in descriptions(path)]
    return Checkpoint(
        path=path,
        config=config,
        files=files,
        side_files=side_files,
        notes=tuple(notes),
        decodings=decodings,
        stored_head=stored_head,
    )


def _refuse_undescribed(path: Path, files: Sequence[WeightFile]) -> None:
    """Refuse packed weights of which config.json says nothing, as old packers wrote them."""
    packed = any(tensor.name.endswith(".qweight") for file in files for tensor in file.tensors)
    if packed and (names := descriptions(path)):
        what = f"the base is quantised, which {names[0]} describes and config.json does not"
        remedy = "Put its fields into config.json, as quantization_config with a quant_method"
        raise refuse(what, str(path / names[0]), f"{remedy} such as gptq, and give --dequantize")


def _decodings(
    path: Path, config: Mapping[str, Any], files: Sequence[WeightFile], decode: Decode
) -> Decodings:
    stored = [Stored(file=n, tensor=t) for n, file in enumerate(files) for t in file.tensors]

    def read(one: Stored) -> bytes:
        file = path / files[one.file].identity.name
        with reported(file), file.open("rb") as opened:
            opened.seek(one.tensor.offset)
            return opened.read(one.tensor.nbytes)

    return decode(config, stored, read, str(path / CONFIG))


def _sources(
    files: Sequence[WeightFile], decodings: Decodings | None
) -> Iterator[tuple[str, Source]]:
    packed = frozenset[str]() if decodings is None else decodings.parts
    for number, file in enumerate(files):
        for tensor in file.tensors:
            if tensor.name not in packed:
                yield tensor.name, Source(tensor=tensor, file=number)
    for name, decoding in ({} if decodings is None else decodings.by_name).items():
        yield name, Source(tensor=decoded_tensor(name, decoding), file=None, decoding=decoding)


def read_header(path: Path) -> WeightFile:
    """Open one safetensors file.

    Raises:
        InputError: its header is damaged or lies.
    """
    with reported(path), path.open("rb") as file:
        identity = FileIdentity.of(path.parent, path.name)
        prefix = file.read(8)
        text = file.read(header_length(prefix, identity.size, str(path)))
    return WeightFile(
        identity=identity,
        header_digest=bytes_digest(prefix + text),
        tensors=parse_header(text, identity.size, str(path)),
    )


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``.

    Raises:
        InputError: there is none, or it is no JSON object.
    """
    if path.exists() and not path.is_file():
        raise refuse("is no file", str(path), "Put the file itself there")  # a pipe would wait
    try:
        data = path.read_bytes()
    except OSError as error:
        raise refuse(
            f"cannot be read ({error.strerror})", str(path), "Check the path and its permissions"
        ) from None
    return parse_object(data, str(path), "Fetch the file again")


def _refuse_other_directories(path: Path) -> None:
    where = str(path)
    if not os.path.isdir(path):
        kind = "is a file, not a checkpoint directory" if os.path.exists(path) else "does not exist"
        raise refuse(f"BASE {kind}", where, "Give the directory that holds config.json")
    if not os.access(path, os.R_OK | os.X_OK):
        raise refuse("BASE may not be read", where, "Ask its owner for permission")
    if (path / "adapter_config.json").exists():
        if not (path / CONFIG).exists():
            raise refuse("is an adapter, not a base", where, "Give BASE first, then ADAPTER")
        raise refuse(
            "holds an adapter beside the base, which loaders would apply on top of the result",
            where,
            "Move adapter_config.json and its weights to a directory of their own",
        )


def _open_weight_files(path: Path, notes: list[str]) -> tuple[WeightFile, ...]:
    present = sorted(p.name for p in path.glob("*.safetensors") if p.is_file())
    indexed, single = (path / INDEX).is_file(), SINGLE in present
    if indexed and single:
        raise refuse(
            f"holds both {SINGLE} and {INDEX}, and loaders disagree on which one counts",
            str(path),
            "Remove the one that is stale",
        )
    if not indexed and not single:
        raise _no_weights(path, present)
    weight_map = _weight_map(path) if indexed else {}
    names = sorted(set(weight_map.values())) if indexed else [SINGLE]
    notes += [
        f"{name} is not named by the index and is left out, as loaders do"
        for name in sorted(set(present) - set(names))
    ]
    problems: list[Problem] = []
    files: list[WeightFile] = []
    for name in names:
        with gathered(problems):
            if name not in present:
                raise refuse(f"the index names {name!r}, which is missing", str(path), _FETCH)
            files.append(read_header(path / name))
    if not problems:
        _check_against_index(files, weight_map, path, problems)
    if problems:
        raise InputError(problems)
    return tuple(files)


_FETCH = "Fetch the checkpoint again; it is incomplete"


def _no_weights(path: Path, present: list[str]) -> InputError:
    if any(path.glob("pytorch_model*.bin")):
        return refuse(
            "the base is in pytorch_model*.bin, which raymeld does not read",
            str(path),
            "Save it once more with transformers: save_pretrained writes safetensors",
        )
    what = f"neither {SINGLE} nor {INDEX}" + (f", only {', '.join(present[:3])}" if present else "")
    return refuse(f"no weights found: {what}", str(path), _FETCH)


def _weight_map(path: Path) -> dict[str, str]:
    where = str(path / INDEX)
    weight_map = read_json(path / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise refuse("weight_map is missing or empty", where, _FETCH)
    problems = [
        Problem(f"weight_map puts {name!r} into {file!r}, outside the checkpoint", where, _FETCH)
        for name, file in weight_map.items()
        if not isinstance(file, str) or Path(file).name != file or file in ("", ".", "..")
    ]
    if problems:
        raise InputError(problems)
    return weight_map


def _check_against_index(
    files: list[WeightFile], weight_map: dict[str, str], path: Path, problems: list[Problem]
) -> None:
    """Every tensor lies in exactly one file, and the index says in which."""
    home: dict[str, str] = {}
    for file in files:
        for tensor in file.tensors:
            here = file.identity.name
            if tensor.name in home:
                what = f"tensor {tensor.name!r} is in {home[tensor.name]} and in {here}"
                problems.append(Problem(what, str(path), _FETCH))
            elif weight_map and weight_map.get(tensor.name) != here:
                said = weight_map.get(tensor.name, "no file")
                what = f"tensor {tensor.name!r} is in {here}, the index says {said}"
                problems.append(Problem(what, str(path / INDEX), _FETCH))
            home[tensor.name] = here
    for name in sorted(weight_map.keys() - home.keys()):
        what = f"tensor {name!r} is not in {weight_map[name]}, where the index puts it"
        problems.append(Problem(what, str(path / INDEX), _FETCH))

"""A base checkpoint, opened from its config, its index and its headers: no tensor is read."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merge_core.architecture import check_architecture
from merge_core.digest import bytes_digest
from merge_core.errors import InputError, Problem, gathered, refuse, shortened
from merge_core.json_text import parse_object
from merge_core.layout import TensorSpec, header_length, parse_header
from merge_core.storage import FileIdentity, reported

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
CONFIG = "config.json"

_WEIGHT_SUFFIXES = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".h5"),
    *(".msgpack", ".ot", ".npz", ".tflite"),
)
_NOT_CARRIED = frozenset({CONFIG, INDEX, "README.md", "pytorch_model.bin.index.json"})
"""config.json is written last by the commit; the base's model card would describe another model."""

TEMPLATES = "additional_chat_templates"
"""The one subfolder that belongs to a tokenizer."""


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
    side_files: tuple[FileIdentity, ...]
    """Carried over byte for byte: tokenizer, generation config, chat template, licence, ..."""
    notes: tuple[str, ...]
    """What the user should know, though nothing is wrong."""


def open_checkpoint(path: Path) -> Checkpoint:
    """Open the checkpoint in directory ``path``.

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
        _refuse_quantised(config, path)
    with gathered(problems):
        files = _open_weight_files(path, notes)
    if config is not None and files:
        with gathered(problems):
            notes += check_architecture(config, _shapes(files), str(path))
    side_files = _side_files(path, problems)
    if problems or config is None:
        raise InputError(problems)
    return Checkpoint(
        path=path, config=config, files=files, side_files=side_files, notes=tuple(notes)
    )


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


def _refuse_quantised(config: Mapping[str, Any], path: Path) -> None:
    quantisation = config.get("quantization_config")
    if not quantisation:
        return
    method = quantisation.get("quant_method") if isinstance(quantisation, dict) else None
    named = shortened(method) if method else "unknown method"
    raise refuse(
        f"the base is quantised ({named}), which cannot take a LoRA delta yet",
        str(path / CONFIG),
        "Merge into the 16-bit checkpoint that it was quantised from, then quantise the result",
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


def _shapes(files: tuple[WeightFile, ...]) -> dict[str, tuple[int, ...]]:
    return {tensor.name: tensor.shape for file in files for tensor in file.tensors}


def _side_files(path: Path, problems: list[Problem]) -> tuple[FileIdentity, ...]:
    names = [
        entry.name
        for entry in path.iterdir()
        if not entry.is_dir()
        and not entry.name.startswith(".")
        and not entry.name.endswith((*_WEIGHT_SUFFIXES, ".index.json"))
        and entry.name not in _NOT_CARRIED
    ]
    if (path / TEMPLATES).is_dir():
        names += [f"{TEMPLATES}/{entry.name}" for entry in (path / TEMPLATES).glob("*.jinja")]
    problems += [
        Problem(
            "is a link that leads nowhere, or no file that may be read", str(path / name), _FETCH
        )
        for name in names
        if not (path / name).is_file() or not os.access(path / name, os.R_OK)
    ]
    return () if problems else tuple(FileIdentity.of(path, name) for name in sorted(names))

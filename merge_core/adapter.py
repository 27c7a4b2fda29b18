"""A PEFT adapter, opened from its config and its header: every key accounted for."""

from __future__ import annotations

import io
import os
import re
import zipfile
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from merge_core.adapter_config import AdapterConfig, read_config
from merge_core.config_values import MAX_SCALE
from merge_core.errors import (
    InputError,
    Problem,
    StorageError,
    gathered,
    refuse,
    shortened,
    some_of,
)
from merge_core.folders import names_in, pinned, read_json, refused
from merge_core.layout import TensorSpec
from merge_core.peft_tuners import tuner_of
from merge_core.refused_tuners import REFUSED
from merge_core.stores.location import DEFAULT_ACCESS, Access, Location, Place, locate
from merge_core.stores.opening import open_store, read_file
from merge_core.stores.store import FileIdentity
from merge_core.trained import Trained, read_trained
from merge_core.weight_files import read_header

CONFIG = "adapter_config.json"
SAFETENSORS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
_DEPTH = 3
"""Folders below what was given in which a lost adapter is looked for: ms-swift writes into
output/MODEL/RUN/checkpoint-STEP."""

_WEIGHT = re.compile(r"^(?P<path>.+)@(?P<weight>[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?)$")
_REPAIR = "Save the adapter again with PEFT; the file is damaged or incomplete"


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """What a PEFT adapter consists of, and the weight that it is merged with."""

    path: Location
    given: Location
    """The folder that was named for it: ``path``, or one above."""
    weight: float
    file: FileIdentity
    config_file: FileIdentity
    config: AdapterConfig
    trained: Trained
    base_name: str | None
    """``base_model_name_or_path``; None: it names none."""
    base_revision: str | None
    """Which version of it, where that is a model on the hub."""
    notes: tuple[str, ...]


AdapterWord = Place | tuple[Place, float]
"""How an adapter is named: with its weight in the text, if it has one, or beside it."""


def parse_adapter(text: AdapterWord, access: Access = DEFAULT_ACCESS) -> tuple[Location, float]:
    """Split ``path@0.5`` into place and weight; a path that exists as a whole has weight 1.

    Raises:
        InputError: it is no place, or what stands behind the @ of a folder is no number.
    """
    if isinstance(text, tuple):
        return locate(text[0], access), text[1]
    match = _WEIGHT.match(str(text))
    if isinstance(text, Location) or match is None or os.path.exists(text):
        _refuse_odd_weight(text)
        return locate(text, access), 1.0
    return locate(match["path"], access), float(match["weight"])


def _refuse_odd_weight(text: Place) -> None:
    if not isinstance(text, str) or os.path.lexists(text):
        return
    folder, _, weight = text.rpartition("@")
    if os.path.isdir(folder):
        remedy = f"Give a number, as in {folder}@0.5, or leave it out"
        raise refuse(f"{shortened(weight)} is no weight", text, remedy)


def open_adapter(path: Location, weight: float = 1.0, given: Location | None = None) -> Adapter:
    """Open the adapter in the folder ``path``.

    Args:
        weight: that it is merged with.
        given: the folder that was named for it, if that is another.

    Raises:
        InputError: with every problem of its config and its keys.
    """
    path = pinned(path)
    names = names_in(path, "ADAPTER", CONFIG)
    if CONFIG not in names:
        raise _no_adapter(path, names)
    problems: list[Problem] = []
    config: AdapterConfig | None = None
    tensors: tuple[TensorSpec, ...] = ()
    if not 0 < abs(weight) <= MAX_SCALE:
        what = f"weight {weight} merges nothing sensible"
        problems.append(Problem(what, str(path), "Give a weight other than 0, or leave it out"))
    config_file = _identity(path, CONFIG)
    fields: dict[str, Any] = {}
    with gathered(problems):
        fields = read_json(path / CONFIG)
        config = read_config(fields, str(path / CONFIG))
    with gathered(problems):
        name = _weights_file(path, names)
        file = _identity(path, name)  # before the header: a file put there later differs
        tensors = _list_tensors(path, name)
    trained: Trained | None = None
    with gathered(problems):
        kind = tuner_of(fields)
        if tensors and kind not in REFUSED:  # whose keys nobody knows
            trained = read_trained(tensors, config, kind, str(path / name))
    if config is None or trained is None or problems:
        raise InputError(problems)
    paths = [*map(config.key_of, trained.pairs), *trained.experts]
    notes = [f"{path}: {slip} matches no module" for slip in config.idle_patterns(paths)]
    if config.targets.unread is not None:
        notes.append(
            f"{path}: {config.targets.unread} is nothing that can be followed, so nothing tells"
            " whether all of the modules that were trained are there"
        )
    if name == SAFETENSORS and PICKLE in names:
        notes.append(f"{path}: {PICKLE} is left out, as PEFT does beside {SAFETENSORS}")
    return Adapter(
        path=path,
        given=given or path,
        weight=weight,
        file=file,
        config_file=config_file,
        config=config,
        trained=trained,
        base_name=_text(fields.get("base_model_name_or_path")),
        base_revision=_text(fields.get("revision")),
        notes=tuple(notes),
    )


def load_pickle(path: Location) -> dict[str, Any]:
    """The tensors of an ``adapter_model.bin``, loaded with ``weights_only``.

    The one place where planning needs torch: a pickle has no header that could be read alone. The
    data is mapped, and read when it is used; files from before torch 1.6, and those that lie in a
    store, are read whole.

    Raises:
        InputError: it is no such file, or holds anything but tensors.
    """
    import torch

    try:
        file = path.local if path.is_local else io.BytesIO(read_file(path))
        mapped = path.is_local and zipfile.is_zipfile(path.local)
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except StorageError:
        raise
    except Exception as error:  # noqa: BLE001 - torch.load raises whatever the damaged bytes lead it to
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        what = f"cannot be loaded with weights_only ({reason})"
        raise refuse(what, str(path), "Save it as adapter_model.safetensors") from None
    if not isinstance(state, dict) or not all(
        isinstance(key, str) and isinstance(value, torch.Tensor) and value.layout == torch.strided
        for key, value in state.items()
    ):
        remedy = "Save it as adapter_model.safetensors"
        raise refuse("holds something else than named dense tensors", str(path), remedy)
    empty = [key for key, value in state.items() if value.is_meta]
    if empty:
        what = f"holds no data for {some_of(empty)}: saved from the meta device"
        raise refuse(what, str(path), _REPAIR)
    return {key: value.detach() for key, value in state.items()}


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and value.strip() else None


def _no_adapter(path: Location, names: Collection[str]) -> InputError:
    where = str(path)
    below = sorted(name.rpartition("/")[0] for name in names if name.endswith(f"/{CONFIG}"))
    below = [folder for folder in below if folder.count("/") < _DEPTH]
    if below:
        remedy = f"Give one of its adapters, for example {path / below[0]}"
        return refuse(f"has no {CONFIG}; there is one in {', '.join(below[:5])}", where, remedy)
    if "config.json" in names:
        return refuse("is a checkpoint, not an adapter", where, "Give BASE first, then ADAPTER")
    return refuse(f"has no {CONFIG}", where, f"Give the directory that holds {CONFIG}")


def _identity(path: Location, name: str) -> FileIdentity:
    try:
        return open_store(path).look(name)
    except StorageError as error:
        raise refused(error) from error


def _weights_file(path: Location, names: Collection[str]) -> str:
    for name in (SAFETENSORS, PICKLE):
        if name in names:
            return name
    raise refuse(f"has neither {SAFETENSORS} nor {PICKLE}", str(path), _REPAIR)


def _list_tensors(path: Location, name: str) -> tuple[TensorSpec, ...]:
    pickled = name != SAFETENSORS
    tensors = _list_pickle(path / name) if pickled else read_header(path, name).tensors
    if not tensors:
        raise refuse("the adapter is empty: it holds no tensor", str(path / name), _REPAIR)
    return tensors


def _list_pickle(path: Location) -> tuple[TensorSpec, ...]:
    names = {"torch.float32": "F32", "torch.float16": "F16", "torch.bfloat16": "BF16"}
    names |= {"torch.uint8": "U8"} | {f"torch.int{bits}": f"I{bits}" for bits in (8, 16, 32, 64)}
    return tuple(
        TensorSpec(
            name=name,
            dtype=names.get(str(tensor.dtype), str(tensor.dtype)),
            shape=tuple(tensor.shape),
            offset=0,  # a pickle is read by name
            nbytes=tensor.numel() * tensor.element_size(),
        )
        for name, tensor in load_pickle(path).items()
    )

"""A PEFT adapter, opened from its config and its header: every key accounted for."""

from __future__ import annotations

import os
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merge_core.adapter_config import AdapterConfig, read_config
from merge_core.checkpoint import read_header, read_json
from merge_core.config_values import MAX_SCALE
from merge_core.errors import InputError, Problem, gathered, refuse, some_of
from merge_core.layout import TensorSpec
from merge_core.peft_tuners import tuner_of
from merge_core.refused_tuners import REFUSED
from merge_core.storage import FileIdentity
from merge_core.trained import Trained, read_trained

CONFIG = "adapter_config.json"
SAFETENSORS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
_WEIGHT = re.compile(r"^(?P<path>.+)@(?P<weight>[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?)$")
_REPAIR = "Save the adapter again with PEFT; the file is damaged or incomplete"


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """What a PEFT adapter consists of, and the weight that it is merged with."""

    path: Path
    given: Path
    """The directory that was named for it: ``path``, or one above."""
    weight: float
    file: FileIdentity
    config_file: FileIdentity
    config: AdapterConfig
    trained: Trained
    base_name: str | None
    """``base_model_name_or_path``; None: it names none."""
    notes: tuple[str, ...]


AdapterWord = str | Path | tuple[str, float]
"""How an adapter is named: with its weight in the text, if it has one, or beside it."""


def parse_adapter(text: AdapterWord) -> tuple[Path, float]:
    """Split ``path@0.5`` into path and weight; a path that exists as a whole has weight 1."""
    if isinstance(text, tuple):
        return Path(text[0]), text[1]
    match = _WEIGHT.match(str(text))
    if match is None or os.path.exists(text):
        return Path(text), 1.0
    return Path(match["path"]), float(match["weight"])


def open_adapter(path: Path, weight: float = 1.0, given: Path | None = None) -> Adapter:
    """Open the adapter in directory ``path``.

    Args:
        weight: that it is merged with.
        given: the directory that was named for it, if that is another.

    Raises:
        InputError: with every problem of its config and its keys.
    """
    if not os.path.isfile(path / CONFIG):
        raise _no_adapter(path)
    problems: list[Problem] = []
    config: AdapterConfig | None = None
    tensors: tuple[TensorSpec, ...] = ()
    if not 0 < abs(weight) <= MAX_SCALE:
        what = f"weight {weight} merges nothing sensible"
        problems.append(Problem(what, str(path), "Give a weight other than 0, or leave it out"))
    config_file = FileIdentity.of(path, CONFIG)
    fields: dict[str, Any] = {}
    with gathered(problems):
        fields = read_json(path / CONFIG)
        config = read_config(fields, str(path / CONFIG))
    with gathered(problems):
        name = _weights_file(path)
        file = FileIdentity.of(path, name)  # before the header: a file put there later differs
        tensors = _list_tensors(path / name)
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
    if name == SAFETENSORS and (path / PICKLE).exists():
        notes.append(f"{path}: {PICKLE} is left out, as PEFT does beside {SAFETENSORS}")
    return Adapter(
        path=path,
        given=given or path,
        weight=weight,
        file=file,
        config_file=config_file,
        config=config,
        trained=trained,
        base_name=_base_name(fields),
        notes=tuple(notes),
    )


def load_pickle(path: Path) -> dict[str, Any]:
    """The tensors of an ``adapter_model.bin``, loaded with ``weights_only``.

    The one place where planning needs torch: a pickle has no header that could be read alone. The
    data is mapped, and read when it is used; files from before torch 1.6 are read whole.

    Raises:
        InputError: it is no such file, or holds anything but tensors.
    """
    import torch

    try:
        mapped = zipfile.is_zipfile(path)
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
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


def _base_name(fields: dict[str, Any]) -> str | None:
    name = fields.get("base_model_name_or_path")
    return name if isinstance(name, str) and name.strip() else None


def _no_adapter(path: Path) -> InputError:
    where = str(path)
    if not os.path.isdir(path):
        kind = "is a file, not an adapter directory" if os.path.exists(path) else "does not exist"
        return refuse(f"ADAPTER {kind}", where, f"Give the directory that holds {CONFIG}")
    below = sorted(
        str(file.parent.relative_to(path))
        for depth in ("*", "*/*", "*/*/*")  # ms-swift: output/MODEL/RUN/checkpoint-STEP
        for file in path.glob(f"{depth}/{CONFIG}")
    )
    if below:
        remedy = f"Give one of its adapters, for example {path / below[0]}"
        return refuse(f"has no {CONFIG}; there is one in {', '.join(below[:5])}", where, remedy)
    if (path / "config.json").is_file():
        return refuse("is a checkpoint, not an adapter", where, "Give BASE first, then ADAPTER")
    return refuse(f"has no {CONFIG}", where, f"Give the directory that holds {CONFIG}")


def _weights_file(path: Path) -> str:
    for name in (SAFETENSORS, PICKLE):
        if (path / name).is_file():
            return name
    raise refuse(f"has neither {SAFETENSORS} nor {PICKLE}", str(path), _REPAIR)


def _list_tensors(path: Path) -> tuple[TensorSpec, ...]:
    tensors = read_header(path).tensors if path.name == SAFETENSORS else _list_pickle(path)
    if not tensors:
        raise refuse("the adapter is empty: it holds no tensor", str(path), _REPAIR)
    return tensors


def _list_pickle(path: Path) -> tuple[TensorSpec, ...]:
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

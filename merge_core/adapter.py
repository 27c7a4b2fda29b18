"""A PEFT adapter, opened from its config and its header: every key accounted for."""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merge_core.adapter_config import MAX_SCALE, LoraConfig, read_config
from merge_core.checkpoint import read_header, read_json
from merge_core.errors import InputError, Problem, counted, gathered, refuse, some_of
from merge_core.layout import TensorSpec
from merge_core.peft_fields import FEATURE_KEYS
from merge_core.storage import FileIdentity

CONFIG = "adapter_config.json"
SAFETENSORS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
FACTOR_DTYPES = frozenset({"F32", "F16", "BF16"})

_PREFIX = "base_model.model."
_COPY = re.compile(r"base_model\.model\.(?P<module>.+)\.base_layer\.weight")
_FACTOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
_WEIGHT = re.compile(r"^(?P<path>.+)@(?P<weight>[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?)$")
_REPAIR = "Save the adapter again with PEFT; the file is damaged or incomplete"
_NOT_YET = "Merge this adapter with PEFT's merge_and_unload for now"


@dataclass(frozen=True, slots=True, kw_only=True)
class LowRankPair:
    """The two factors of one module: delta = scaling * B @ A."""

    a: TensorSpec
    """[rank, in_features]"""
    b: TensorSpec
    """[out_features, rank]"""
    scaling: float
    """alpha / r (or alpha / sqrt(r)), without the adapter's weight."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """What a PEFT adapter consists of, and the weight that it is merged with."""

    path: Path
    weight: float
    file: FileIdentity
    config_file: FileIdentity
    config: LoraConfig
    pairs: Mapping[str, LowRankPair]
    """By module path, such as ``model.layers.0.self_attn.q_proj``."""
    copies: Mapping[str, TensorSpec]
    """Base weights that PEFT saved beside the factors, by module: it does so when lm_head is a
    target, in case the vocabulary was resized. They must equal the base's own."""
    notes: tuple[str, ...]


def parse_adapter(text: str | Path) -> tuple[Path, float]:
    """Split ``path@0.5`` into path and weight; a path that exists as a whole has weight 1."""
    match = _WEIGHT.match(str(text))
    if match is None or os.path.exists(text):
        return Path(text), 1.0
    return Path(match["path"]), float(match["weight"])


def open_adapter(path: Path, weight: float = 1.0) -> Adapter:
    """Open the adapter in directory ``path``.

    Raises:
        InputError: with every problem of its config and its keys.
    """
    if not os.path.isfile(path / CONFIG):
        raise _no_adapter(path)
    problems: list[Problem] = []
    config: LoraConfig | None = None
    tensors: tuple[TensorSpec, ...] = ()
    if not 0 < abs(weight) <= MAX_SCALE:
        what = f"weight {weight} merges nothing sensible"
        problems.append(Problem(what, str(path), "Give a weight other than 0, or leave it out"))
    config_file = FileIdentity.of(path, CONFIG)
    with gathered(problems):
        config = read_config(read_json(path / CONFIG), str(path / CONFIG))
    with gathered(problems):
        name = _weights_file(path)
        file = FileIdentity.of(path, name)  # before the header: a file put there later differs
        tensors = _list_tensors(path / name)
        _refuse_strange_keys(tensors, path / name)
    pairs = {} if config is None else _pairs(tensors, config, str(path), problems)
    if config is None or problems:
        raise InputError(problems)
    notes = [f"{path}: {slip} matches no module" for slip in config.idle_patterns(pairs)]
    if name == SAFETENSORS and (path / PICKLE).exists():
        notes.append(f"{path}: {PICKLE} is left out, as PEFT does beside {SAFETENSORS}")
    return Adapter(
        path=path,
        weight=weight,
        file=file,
        config_file=config_file,
        config=config,
        pairs=pairs,
        copies=_copies(tensors),
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


def _no_adapter(path: Path) -> InputError:
    where = str(path)
    if not os.path.isdir(path):
        kind = "is a file, not an adapter directory" if os.path.exists(path) else "does not exist"
        return refuse(f"ADAPTER {kind}", where, f"Give the directory that holds {CONFIG}")
    below = sorted(p.parent.name for p in path.glob(f"*/{CONFIG}"))
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
    if path.name == SAFETENSORS:
        return read_header(path).tensors
    names = {"torch.float32": "F32", "torch.float16": "F16", "torch.bfloat16": "BF16"}
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


def _refuse_strange_keys(tensors: tuple[TensorSpec, ...], path: Path) -> None:
    """One problem a feature that is not merged yet, one an unknown key."""
    if not tensors:
        raise refuse("the adapter is empty: it holds no tensor", str(path), _REPAIR)
    by_feature: dict[str, list[str]] = {}
    problems: list[Problem] = []
    copied = {f"{_PREFIX}{module}.lora_A.weight" for module in _copies(tensors)}
    alone = copied - {tensor.name for tensor in tensors}
    problems += [
        Problem(f"{copy.name!r} is {copy.dtype}, not F32, F16 or BF16", str(path), _REPAIR)
        for copy in _copies(tensors).values()
        if copy.dtype not in FACTOR_DTYPES
    ]
    if alone:
        what = f"base_layer.weight stands alone; {min(alone)!r} is missing"
        problems.append(Problem(what, str(path), _REPAIR))
    for name in (t.name for t in tensors if not _COPY.fullmatch(t.name)):
        feature = next((label for regex, label in FEATURE_KEYS if regex.search(name)), None)
        if feature:
            by_feature.setdefault(feature, []).append(name)
        elif not _FACTOR.fullmatch(name):
            what = f"key {name!r} is not known, and nothing is dropped silently"
            problems.append(Problem(what, str(path), _REPAIR))
    for feature, names in by_feature.items():
        which = f"{counted(len(names), 'tensor')}, such as {names[0]!r}"
        what = f"{feature} is not merged yet ({which})"
        problems.append(Problem(what, str(path), _NOT_YET))
    if problems:
        raise InputError(problems)


def _copies(tensors: tuple[TensorSpec, ...]) -> dict[str, TensorSpec]:
    matches = ((tensor, _COPY.fullmatch(tensor.name)) for tensor in tensors)
    return {match["module"]: tensor for tensor, match in matches if match}


def _pairs(
    tensors: tuple[TensorSpec, ...], config: LoraConfig, where: str, problems: list[Problem]
) -> dict[str, LowRankPair]:
    sides: dict[str, dict[str, TensorSpec]] = {}
    for tensor in tensors:
        match = _FACTOR.fullmatch(tensor.name)
        if match:
            sides.setdefault(match["module"], {})[match["side"]] = tensor
    pairs = {}
    for module, found in sides.items():
        with gathered(problems):
            pairs[module] = _pair(module, found, config, where)
    return pairs


def _pair(
    module: str, found: Mapping[str, TensorSpec], config: LoraConfig, where: str
) -> LowRankPair:
    at = f"{where}, module {module}"
    if len(found) == 1:
        (side,) = found
        other = "B" if side == "A" else "A"
        raise refuse(f"has lora_{side} but no lora_{other}", at, _REPAIR)
    a, b = found["A"], found["B"]
    for factor in (a, b):
        if len(factor.shape) != 2 or 0 in factor.shape:
            what = f"{factor.name} has shape {list(factor.shape)}, not two sizes above 0"
            raise refuse(what, at, _REPAIR)
        if factor.dtype not in FACTOR_DTYPES:
            raise refuse(
                f"{factor.name} is {factor.dtype}, not F32, F16 or BF16",
                at,
                "Cast the adapter to one of them",
            )
    rank, scaling = config.resolve(module)
    if not a.shape[0] == b.shape[1] == rank:
        what = f"lora_A has rank {a.shape[0]}, lora_B {b.shape[1]}, the config says {rank}"
        raise refuse(what, at, "Use the adapter_config.json that was saved with these weights")
    return LowRankPair(a=a, b=b, scaling=scaling)

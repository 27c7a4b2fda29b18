"""A device map: which modules of the output are merged on a GPU, and which on a CPU.

The file is what people know from Transformers, module names and devices as JSON:

    {"model.embed_tokens": "cpu", "model.layers": "cuda", "model.layers.70-79": "cpu"}

The longest name that covers a tensor decides; a tensor that no name covers goes anywhere. Which GPU
it is belongs to whoever hands out GPUs, so ``0`` and ``cuda:3`` both mean ``cuda``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merge_core.errors import InputError, Problem, refuse, some_of
from merge_core.json_text import parse_object
from merge_core.storage import reported

_RANGE = re.compile(r"(.*\.|)(\d{1,4})-(\d{1,4})")
_GPU = re.compile(r"cuda(:\d+)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceMap:
    """``cuda`` or ``cpu`` by module name."""

    path: Path
    modules: dict[str, str]

    def device_of(self, tensor: str) -> str | None:
        """Where a tensor is merged; None: anywhere."""
        name = self._covering(tensor)
        return None if name is None else self.modules[name]

    def check(self, tensors: Iterable[str]) -> None:
        """Make sure that the map speaks of this checkpoint.

        Raises:
            InputError: a name covers none of its tensors.
        """
        covered = {prefix for tensor in tensors for prefix in _prefixes(tensor)}
        strange = [name for name in self.modules if name not in covered]
        if strange:
            remedy = "Name modules as the checkpoint does, such as model.layers.0"
            raise refuse(f"the base has no {some_of(strange)}", str(self.path), remedy)

    def _covering(self, tensor: str) -> str | None:
        return next((name for name in _prefixes(tensor) if name in self.modules), None)


def read_device_map(path: Path) -> DeviceMap:
    """Read a device map.

    Raises:
        InputError: with everything that is wrong in it.
        StorageError: it cannot be read.
    """
    with reported(path):
        data = path.read_bytes()
    fields = parse_object(data, str(path), 'Write {"model.layers": "cuda", "lm_head": "cpu"}')
    modules: dict[str, str] = {}
    problems: list[Problem] = []
    for key, value in fields.items():
        device = _device(value)
        if device is None:
            what = f"{key!r} is mapped to {value!r}"
            remedy = "Map it to cuda or cpu: a worker holds some tiles of it, and offloads nothing"
            problems.append(Problem(what, str(path), remedy))
            continue
        for name in _names(key):
            if name in modules:
                problems.append(Problem(f"{name!r} is mapped twice", str(path), "Map it once"))
            modules[name] = device
    if problems:
        raise InputError(problems)
    return DeviceMap(path=path, modules=modules)


def _device(value: Any) -> str | None:
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return "cuda"
    if isinstance(value, str) and _GPU.fullmatch(value):
        return "cuda"
    return "cpu" if value == "cpu" else None


def _names(key: str) -> Iterator[str]:
    match = _RANGE.fullmatch(key)
    if match is None:
        yield key
        return
    for number in range(int(match[2]), int(match[3]) + 1):
        yield f"{match[1]}{number}"


def _prefixes(tensor: str) -> Iterator[str]:
    """The tensor's name, its module, the module around that, and so on up to the empty name."""
    name = tensor
    while name:
        yield name
        name = name.rpartition(".")[0]
    yield ""

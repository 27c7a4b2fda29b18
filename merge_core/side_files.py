"""The files beside the weights that a merge carries over byte for byte."""

from __future__ import annotations

import re
from collections.abc import Collection

from merge_core.errors import InputError, Problem, StorageError
from merge_core.plan import SideFile
from merge_core.stores.location import Location
from merge_core.stores.opening import open_store

INDEX = "model.safetensors.index.json"
CONFIG = "config.json"

_WEIGHT_SUFFIXES = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".h5"),
    *(".msgpack", ".ot", ".npz", ".tflite"),
)
_NOT_CARRIED = frozenset({CONFIG, INDEX, "pytorch_model.bin.index.json"})
"""config.json is written last by the commit."""

_CARDS = re.compile(r"^README((?:\.base)*)\.md$")
"""The base's model card describes another model. It is carried over as ``README.base.md``, for the
licence's sake, and that of the base's own base as ``README.base.base.md``."""

TEMPLATES = "additional_chat_templates"
"""The one subfolder that belongs to a tokenizer."""

_DESCRIPTIONS = ("quant_config.json", "quantize_config.json")
"""Where quantisers repeat the quantization_config of config.json."""


def descriptions(names: Collection[str]) -> list[str]:
    """Side files of a quantised base that say nothing about one that was decoded."""
    return [name for name in _DESCRIPTIONS if name in names]


def find_side_files(
    folder: Location, names: Collection[str], *, quantised: bool
) -> tuple[SideFile, ...]:
    """Those of the base in ``folder``.

    Args:
        names: of all files there.
        quantised: leave out what describes the packed weights.

    Raises:
        InputError: with each that cannot be read.
    """
    left_out = {*_NOT_CARRIED, *(_DESCRIPTIONS if quantised else ())}
    store, found, problems = open_store(folder), [], []
    for name in sorted(name for name in names if _is_carried(name) and name not in left_out):
        try:
            new = _CARDS.sub(r"README\1.base.md", name)
            found.append(SideFile(name=new, folder=folder, file=store.look(name)))
        except StorageError as error:
            what = f"is a link that leads nowhere, or no file that may be read ({error.what})"
            remedy = "Fetch the checkpoint again; it is incomplete"
            problems.append(Problem(what, str(folder / name), remedy))
    if problems:
        raise InputError(problems)
    return tuple(sorted(found, key=lambda side: side.name))


def templates_in(names: Collection[str]) -> list[str]:
    """The chat templates beside the one that a tokenizer uses by default."""
    return sorted(
        name for name in names if name.rpartition("/")[0] == TEMPLATES and name.endswith(".jinja")
    )


def _is_carried(name: str) -> bool:
    if "/" in name:
        return bool(templates_in([name]))
    return not (name.startswith(".") or name.endswith((*_WEIGHT_SUFFIXES, ".index.json")))

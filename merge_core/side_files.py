"""The files beside the weights that a merge carries over byte for byte."""

from __future__ import annotations

import os
import re
from pathlib import Path

from merge_core.errors import InputError, Problem
from merge_core.plan import SideFile
from merge_core.storage import FileIdentity

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


def descriptions(path: Path) -> list[str]:
    """Side files of a quantised base that say nothing about one that was decoded."""
    return [name for name in _DESCRIPTIONS if (path / name).exists()]


def find_side_files(path: Path, *, quantised: bool) -> tuple[SideFile, ...]:
    """Those of the base in directory ``path``.

    Args:
        quantised: leave out what describes the packed weights.

    Raises:
        InputError: with each that cannot be read.
    """
    left_out = {*_NOT_CARRIED, *(_DESCRIPTIONS if quantised else ())}
    names = [
        entry.name
        for entry in path.iterdir()
        if not entry.is_dir()
        and not entry.name.startswith(".")
        and not entry.name.endswith((*_WEIGHT_SUFFIXES, ".index.json"))
        and entry.name not in left_out
    ]
    names += templates_in(path)
    problems = [
        Problem(
            "is a link that leads nowhere, or no file that may be read",
            str(path / name),
            "Fetch the checkpoint again; it is incomplete",
        )
        for name in names
        if not (path / name).is_file() or not os.access(path / name, os.R_OK)
    ]
    if problems:
        raise InputError(problems)
    files = (
        SideFile(name=_CARDS.sub(r"README\1.base.md", name), folder=path, file=identity)
        for name, identity in ((name, FileIdentity.of(path, name)) for name in names)
    )
    return tuple(sorted(files, key=lambda file: file.name))


def templates_in(path: Path) -> list[str]:
    """The chat templates beside the one that a tokenizer uses by default."""
    if not (path / TEMPLATES).is_dir():
        return []
    return [f"{TEMPLATES}/{entry.name}" for entry in (path / TEMPLATES).glob("*.jinja")]

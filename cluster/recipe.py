"""Recipes: the words and flags of a merge, in a file."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from cluster.mergekit import from_mergekit, is_mergekit
from cluster.recipe_model import recipe_model
from cluster.yaml_text import Document, Place, read_yaml
from merge_core.adapter import AdapterWord
from merge_core.errors import InputError, Problem, refuse, shortened
from merge_core.stores.location import is_bare_hub_id

LARGEST = 1 << 20
"""Bytes of a recipe."""

_SEE = "See docs/recipes.md"

PATHS = ("device_map", "out", "scratch", "state", "tokenizer")
"""Options that are paths."""

_NEVER_ON_HUB = frozenset({"device_map", "out", "scratch", "state"})

_ELSEWHERE = {
    "base_model": "base",
    "model": "base",
    "model_name_or_path": "base",
    "adapter": "adapters",
    "adapter_name_or_path": "adapters",
    "lora_model_dir": "adapters",
    "export_dir": "out",
    "output": "out",
    "output_dir": "out",
    "merge_method": "combine",
    "export_size": "shard_size",
    "max_shard_size": "shard_size",
    "torch_dtype": "dtype",
    "tokenizer_source": "tokenizer",
    "export_device": "device",
}
"""What other tools call our options: LLaMA-Factory, axolotl, mergekit."""

_KINDS = {
    "int": ("is no whole number", "Give one such as 4"),
    "float": ("is no number", "Give one such as 0.5"),
    "bool": ("is neither true nor false", "Give one of them"),
    "string": ("is no text", "Give one, in quotes if need be"),
    "list": ("is no list", "Begin a line with '- ' for each"),
    "path": ("is no path", "Give one"),
    "model": ("is neither a path nor a path with a weight", "Give - path: and weight:"),
}
"""By the first word of what pydantic calls an error: what is wrong, and what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What a recipe asks for."""

    base: str | None
    adapters: tuple[AdapterWord, ...]
    options: Mapping[str, Any]
    """By the names of the flags' parameters; those that stand there."""


def read_recipe(path: Path) -> Recipe:
    """The recipe in file ``path``. Relative paths in it start in its directory.

    Raises:
        InputError: with everything that is wrong in it, by line and column.
    """
    document = read_yaml(_text(path))
    if is_mergekit(document):
        value, faults = from_mergekit(document)
        document.faults += faults
        document.value = value
    problems = [_problem(path, place, what, _SEE) for place, what in document.faults]
    if not problems and not isinstance(document.value, dict):
        what = "is no mapping of options to values"
        raise refuse(what, str(path), "Let `raymeld recipe` write one")
    found: dict[str, Any] = {}
    if isinstance(document.value, dict):
        try:
            model = recipe_model().model_validate(document.value)
            found = {name: getattr(model, name) for name in model.model_fields_set}
        except ValidationError as error:
            problems += _problems(error, document, path)
    if problems:
        raise InputError(sorted(problems, key=lambda problem: _order(problem.where)))
    return _anchored(found, path.absolute().parent)


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(LARGEST + 1)
    except OSError as error:
        what = f"cannot be read ({error.strerror})"
        raise refuse(what, str(path), "Give a recipe, or BASE and ADAPTER") from None
    if len(data) > LARGEST:
        raise refuse("is larger than any recipe", str(path), "Give a recipe, or BASE and ADAPTER")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise refuse(f"is no text ({error.reason})", str(path), "Save it as UTF-8") from None


def _anchored(found: dict[str, Any], folder: Path) -> Recipe:
    options = {
        name: anchored(str(value), folder, name)
        if name in PATHS
        else getattr(value, "value", value)
        for name, value in found.items()
        if name not in ("base", "adapters") and value is not None
    }
    base = found.get("base")
    return Recipe(
        base=None if base is None else anchored(base, folder),
        adapters=tuple(_word(entry, folder) for entry in found["adapters"]),
        options=options,
    )


def _word(entry: Any, folder: Path) -> AdapterWord:
    path = anchored(entry.path, folder)
    return path if entry.weight is None else (path, entry.weight)


def anchored(text: str, folder: Path, option: str = "base") -> str:
    """What ``text`` means in ``folder``: a path in it, unless it is a URL, the word ``base`` of a
    tokenizer, or the id of a model on the hub.
    """
    if "://" in text or (option == "tokenizer" and text == "base"):
        return text
    if option not in _NEVER_ON_HUB and is_bare_hub_id(
        text, lambda path: os.path.lexists(folder / path)
    ):
        return f"hf://{text}"
    return str(folder / os.path.expanduser(text))


def _problems(error: ValidationError, document: Document, path: Path) -> Iterator[Problem]:
    for detail in error.errors(include_url=False):
        unknown = detail["type"] == "extra_forbidden"
        place = document.place_of(detail["loc"], key=unknown)
        what, remedy = _words(detail)
        yield _problem(path, place, what, remedy)


def _words(detail: ErrorDetails) -> tuple[str, str]:
    """What is wrong, and what to do."""
    *above, name = detail["loc"] or ("recipe",)
    kind, context = detail["type"], detail.get("ctx", {})
    if kind == "extra_forbidden":
        return f"there is no option {shortened(name)}", _meant(str(name), inner=bool(above))
    if kind == "value_error":  # of what the flag is checked with
        what, remedy = context["error"].args
        return f"{name}: {what}", remedy
    if kind in ("enum", "literal_error"):
        return f"{_said(detail)} is none of its values", _choice(detail)
    plain = {
        "missing": (f"{name} is missing", "Give it"),
        "too_short": (f"{name} is empty", "Name at least one adapter"),
        "greater_than_equal": (
            f"{_said(detail)} is too small",
            f"Give at least {context.get('ge')}",
        ),
    }
    what, remedy = _KINDS.get(kind.partition("_")[0], (f"({detail['msg']})", "Give another value"))
    return plain.get(kind, (f"{_said(detail)} {what}", remedy))


def _said(detail: ErrorDetails) -> str:
    """The option, or the position in a list, and what stands there."""
    *above, name = detail["loc"] or ("recipe",)
    where = name if isinstance(name, str) else f"{above[-1]}, number {name + 1}"
    return f"{where}: {shortened(detail['input'])}"


def _choice(detail: ErrorDetails) -> str:
    choices = re.findall(r"'([^']+)'", str(detail["ctx"]["expected"]))
    near = difflib.get_close_matches(str(detail["input"]).lower(), choices, n=1)
    return f"Did you mean {near[0]}?" if near else f"Take one of {', '.join(choices)}"


def _meant(name: str, *, inner: bool) -> str:
    names = ["path", "weight"] if inner else list(recipe_model().model_fields)
    wanted = name.replace("-", "_").lower()
    near = difflib.get_close_matches(wanted, names, n=1, cutoff=0.7)
    known = _ELSEWHERE.get(wanted) if not inner else None
    if known or near:
        return f"Did you mean {known or near[0]}?"
    return f"Take {' or '.join(names)}" if inner else "Leave it out"


def _problem(path: Path, place: Place, what: str, remedy: str) -> Problem:
    return Problem(what, f"{path}:{place[0]}:{place[1]}", remedy)


def _order(where: str) -> tuple[int, int]:
    _, line, column = where.rsplit(":", 2)
    return int(line), int(column)

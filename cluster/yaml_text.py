"""YAML that a person wrote: its values, and where in the text each of them stands.

Plain words are taken as YAML 1.2 has it (``no`` and ``012`` are texts and tens, no truths and
octals). No tags and no aliases: a recipe needs none, and a few aliases unfold to gigabytes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import yaml

Path = tuple[str | int, ...]
"""Keys and positions that lead to a value."""

Place = tuple[int, int]
"""Line and column, from 1 on."""

_NULL = re.compile(r"~|null|Null|NULL|")
_TRUTH = re.compile(r"true|True|TRUE|false|False|FALSE")
_WHOLE = re.compile(r"[-+]?[0-9]+")
_NUMBER = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_TAGS = frozenset(
    f"tag:yaml.org,2002:{kind}"
    for kind in ("map", "seq", "str", "int", "float", "bool", "null", "timestamp", "merge", "value")
)
"""What PyYAML calls values that have no tag of their own."""

DEPTH = 20
"""Of values in values; no recipe has more than four."""


@dataclass(slots=True)
class Document:
    """A text, read."""

    value: Any = None
    keys: dict[Path, Place] = field(default_factory=dict)
    """Where the key of a value begins."""
    values: dict[Path, Place] = field(default_factory=dict)
    faults: list[tuple[Place, str]] = field(default_factory=list)
    """What is wrong with the text itself."""

    def place_of(self, path: Path, *, key: bool = False) -> Place:
        """Where the value stands, or its key; of one that is not there, where it would be."""
        while path not in self.values and path:
            path = path[:-1]
        return (self.keys if key else self.values).get(path) or self.values.get(path, (1, 1))


def read_yaml(text: str) -> Document:
    """Read ``text``; what is wrong with it is in ``faults``."""
    document = Document()
    try:
        node = yaml.compose(text, yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = " ".join(filter(None, (error.context, error.problem)))
        document.faults.append((_place(mark), problem))
    except (yaml.YAMLError, RecursionError) as error:
        document.faults.append(((1, 1), " ".join(str(error).split())))
    else:
        document.value = None if node is None else _value(node, (), document, set())
    return document


def _value(node: Any, path: Path, document: Document, seen: set[int]) -> Any:
    place = document.values[path] = _place(node.start_mark)
    if id(node) in seen or len(path) > DEPTH:
        what = "an alias" if id(node) in seen else f"nested more than {DEPTH} deep"
        document.faults.append((place, f"{what}, which recipes have not"))
        return None
    seen.add(id(node))
    if node.tag not in _TAGS:
        document.faults.append((place, f"the tag {node.tag!r}, which recipes have not"))
        return None
    if isinstance(node, yaml.MappingNode):
        return dict(_pairs(node, path, document, seen))
    if isinstance(node, yaml.SequenceNode):
        return [_value(one, (*path, n), document, seen) for n, one in enumerate(node.value)]
    return _scalar(node.value) if node.style is None else node.value


def _pairs(node: Any, path: Path, document: Document, seen: set[int]) -> Iterator[tuple[str, Any]]:
    for key, value in node.value:
        place, name = _place(key.start_mark), key.value
        if not isinstance(name, str):
            document.faults.append((place, "a key that is no text"))
            continue
        inner = (*path, name)
        if inner in document.keys:
            line = document.keys[inner][0]
            document.faults.append(
                (place, f"{name!r} for the second time; the first is in line {line}")
            )
            continue
        document.keys[inner] = place
        yield name, _value(value, inner, document, seen)


def _scalar(text: str) -> Any:
    if _NULL.fullmatch(text):
        return None
    if _TRUTH.fullmatch(text):
        return text.lower() == "true"
    if _WHOLE.fullmatch(text) and len(text) < 100:
        return int(text)
    return float(text) if _NUMBER.fullmatch(text) and len(text) < 100 else text


def _place(mark: Any) -> Place:
    return (1, 1) if mark is None else (mark.line + 1, mark.column + 1)

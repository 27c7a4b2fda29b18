"""A recipe, written: the YAML that ``raymeld merge`` reads, each option with a comment.

Texts stand in double quotes, so that no path or name is taken for anything else.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from merge_core import __version__
from merge_core.plan import MergePlan

_WIDTH = 98


def recipe_text(head: str, values: Mapping[str, Any], about: Mapping[str, str]) -> str:
    """The YAML of a recipe.

    Args:
        head: what stands above it all, as a comment.
        values: by option; those that are None are named, and commented out.
        about: by option, what it does; such an option stands apart.
    """
    lines = [*_comment(head)]
    for name, value in values.items():
        if name in about:
            lines += ["", *_comment(about[name])]
        lines += _lines(name, value) if value is not None else [f"# {name}:"]
    return "\n".join(lines) + "\n"


def recipe_of(plan: MergePlan) -> str:
    """The recipe that is kept with a merge: all that changes its bytes, and no more."""
    head = (
        f"What raymeld {__version__} merged. `raymeld merge THIS_FILE --out DIRECTORY` does it"
        " again, to the same bytes on the same kind of device."
    )
    return recipe_text(head, plan.recipe, {})


def scalar(value: Any) -> str:
    """A number, a truth or a text."""
    if isinstance(value, bool | int | float):
        return json.dumps(value)
    return f'"{"".join(map(_escaped, str(value)))}"'


def _escaped(char: str) -> str:
    """As YAML writes it between double quotes: what people can read stays as it is."""
    if char in '"\\':
        return f"\\{char}"
    if char.isprintable():
        return char
    return f"\\u{ord(char):04x}" if ord(char) <= 0xFFFF else f"\\U{ord(char):08x}"


def _lines(name: str, value: Any) -> Iterator[str]:
    if not isinstance(value, list | tuple):
        yield f"{name}: {scalar(value)}"
        return
    yield f"{name}:"
    for entry in value:
        for number, (key, part) in enumerate(entry.items()):
            yield f"{'  ' if number else '- '}{key}: {scalar(part)}"


def _comment(text: str) -> list[str]:
    return [f"# {line}" for line in textwrap.wrap(text, _WIDTH)]

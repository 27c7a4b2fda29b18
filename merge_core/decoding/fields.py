"""The fields of a ``quantization_config``: each is understood, or known to change no value."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from merge_core.errors import InputError, Problem, shortened

REMEDY = "Merge into the 16-bit checkpoint that it was quantised from"


@dataclass(frozen=True, slots=True, kw_only=True)
class Field:
    """What a field that changes values may say."""

    default: Any
    allowed: Callable[[Any], bool]
    expected: str
    """In words."""


def read_fields(
    config: Mapping[str, Any], known: Mapping[str, Field], neutral: frozenset[str], where: str
) -> dict[str, Any]:
    """The values of ``known`` fields.

    Args:
        config: the quantization_config.
        neutral: fields that steered the quantisation, or steer the inference, and change nothing
            about what the stored tensors mean.

    Raises:
        InputError: with every field that is unknown and says something, or has a value that is not
            understood.
    """
    problems, values = [], {}
    for name, field in known.items():
        value = config.get(name, field.default)
        values[name] = field.default if value is None else value
        if not field.allowed(values[name]):
            what = f"quantization_config has {name} = {shortened(value)}, not {field.expected}"
            problems.append(Problem(what, where, REMEDY))
    for name in config.keys() - known.keys() - neutral - {"quant_method"}:
        if config[name] not in (None, False, {}, []):
            what = f"quantization_config has {name} = {shortened(config[name])}, which is not known"
            problems.append(Problem(what, where, REMEDY))
    if problems:
        raise InputError(sorted(problems, key=lambda problem: problem.what))
    return values


def one_of(*values: Any) -> Callable[[Any], bool]:
    """Whether a value is one of these, and not merely equal to it as True is to 1."""
    return lambda value: any(type(value) is type(one) and value == one for one in values)


def is_size(value: Any) -> bool:
    """Whether it is a number of elements: a whole one, above 0."""
    return type(value) is int and 0 < value < 1 << 31

"""Which values the fields of adapter_config.json may have, and the regexes among them."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from merge_core.block_diagonal import is_block_diagonal
from merge_core.errors import Problem, shortened

MAX_RANK, MAX_SCALE, MAX_ROW, MAX_LAYERS = 10**6, 10**9, 10**9, 10**4
"""Beyond anything that was ever trained; keeps hostile numbers out of the arithmetic below."""

_REPEATED_GROUP = re.compile(r"\)[+*{]")
_UNBOUNDED = re.compile(r"(?<!\\)[+*{]")
_OPTIONAL = re.compile(r"(?<![\\(+*}])\?")
MAX_PATTERN, MAX_UNBOUNDED, MAX_OPTIONAL = 1000, 3, 10
"""A pattern may take for ever to match if it repeats a group, and its time grows with the length
of a module's path to the power of its unbounded quantifiers. What selects modules needs neither."""

_REPAIR = "Correct the value, or save the adapter again with PEFT"


def malformed(fields: Mapping[str, Any], where: str) -> list[Problem]:
    """A problem for each field that has no sensible value."""
    checks: _Checks = (
        ("r", 8, _is_rank, "a whole number above 0"),
        ("lora_alpha", 8, _is_number, "a number other than 0"),
        ("use_rslora", False, _is_flag, "true or false"),
        ("fan_in_fan_out", False, _is_flag, "true or false"),
        ("rank_pattern", {}, lambda v: _is_pattern(v, _is_rank), "a map of regexes to ranks"),
        ("alpha_pattern", {}, lambda v: _is_pattern(v, _is_number), "a map of regexes to numbers"),
        ("use_dora", False, _is_flag, "true or false"),
        ("lora_bias", False, _is_flag, "true or false"),
        ("ensure_weight_tying", False, _is_flag, "true or false"),
        ("bias", "none", lambda v: v in ("none", "all", "lora_only"), "none, all or lora_only"),
        ("modules_to_save", (), are_names, "a list of names"),
        ("layer_replication", None, _are_ranges, "a list of ranges [start, end] of layers"),
        ("target_parameters", (), are_names, "a list of names"),
        ("peft_version", None, lambda v: v is None or isinstance(v, str), "a version"),
        ("use_bdlora", None, is_block_diagonal, "a BdLoraConfig"),
        ("trainable_token_indices", (), _are_tokens, "different rows, by module or without"),
        ("token_indices", (), _are_rows, "different rows"),
    )
    return [
        *_failed(checks, fields, where),
        *_slow(("rank_pattern", "alpha_pattern"), fields, where),
    ]


_Checks = Sequence[tuple[str, Any, Callable[[Any], bool], str]]


def malformed_tuner(fields: Mapping[str, Any], where: str) -> list[Problem]:
    """The same for a tuner other than LoRA, of the fields that are not left to PEFT alone."""
    of_ia3: _Checks = (("target_modules", (), _are_targets, "a list of names or a regex"),)
    checks: _Checks = (
        *(of_ia3 if fields.get("feedforward_modules") else ()),  # of others the keys tell as much
        ("r", 0, _is_rank_or_none, "a whole number, 0 or more"),
        ("fan_in_fan_out", False, _is_flag, "true or false"),
        ("bias", "none", _is_bias, "none, all or the layers' own, such as oft_only"),
        ("modules_to_save", (), are_names, "a list of names"),
        ("feedforward_modules", (), _are_targets, "a list of names or a regex"),
        *((n, {}, lambda v: _is_pattern(v, lambda _: True), "a map of regexes") for n in _PATTERNS),
    )
    return [*_failed(checks, fields, where), *_slow(_PATTERNS, fields, where)]


_PATTERNS = (
    "rank_pattern",
    "alpha_pattern",
    "lambda_pattern",
    "n_frequency_pattern",
    "block_size_pattern",
)


def _slow(names: Sequence[str], fields: Mapping[str, Any], where: str) -> Iterator[Problem]:
    for name in names:
        patterns = fields.get(name)
        for key in filter(_is_slow, patterns if isinstance(patterns, dict) else ()):
            what = f"{name} has {shortened(key)}, which may take for ever to match"
            yield Problem(what, where, "Write it without nested or many repetitions")


def _failed(checks: _Checks, fields: Mapping[str, Any], where: str) -> list[Problem]:
    return [
        Problem(f"{name} is {shortened(fields[name])}, not {expected}", where, _REPAIR)
        for name, default, is_valid, expected in checks
        if not is_valid(fields.get(name, default))
    ]


def _is_rank_or_none(value: Any) -> bool:
    return value is None or value == 0 or _is_rank(value)


def _is_bias(value: Any) -> bool:
    return value in ("none", "all") or (isinstance(value, str) and value.endswith("_only"))


def _are_targets(value: Any) -> bool:
    return are_names(value) or (isinstance(value, str) and is_regex(value))


def _is_rank(value: Any) -> bool:
    return type(value) is int and 0 < value <= MAX_RANK


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and 0 < abs(value) <= MAX_SCALE


def _is_flag(value: Any) -> bool:
    return value is None or type(value) is bool


def are_names(value: Any) -> bool:
    """Whether ``value`` is a list of names, or nothing."""
    return value is None or (
        isinstance(value, (list, tuple)) and all(isinstance(v, str) and v for v in value)
    )


def _are_ranges(value: Any) -> bool:
    return value is None or (
        isinstance(value, list)
        and all(isinstance(one, list) and len(one) == 2 for one in value)
        and all(type(n) is int and 0 <= n <= MAX_LAYERS for one in value for n in one)
        and sum(max(0, end - start) for start, end in value) <= MAX_LAYERS
    )


def _are_rows(value: Any) -> bool:
    return (
        isinstance(value, (list, tuple))
        and all(type(row) is int and 0 <= row <= MAX_ROW for row in value)
        and len(set(value)) == len(value)
    )


def _are_tokens(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(name, str) and name for name in value) and all(
            map(_are_rows, value.values())
        )
    return value is None or _are_rows(value)


def _is_pattern(value: Any, is_valid: Any) -> bool:
    if value is None:
        return True
    return isinstance(value, dict) and all(
        (_is_slow(key) or is_regex(key)) and is_valid(one) for key, one in value.items()
    )


def is_regex(text: str) -> bool:
    """Whether ``text`` is a regex that ends in sensible time."""
    if _is_slow(text):
        return False
    try:
        at_end(text)
    except (re.error, RecursionError, OverflowError):
        return False
    return True


def _is_slow(text: str) -> bool:
    if len(text) > MAX_PATTERN or _REPEATED_GROUP.search(text):
        return True
    repeated, optional = _UNBOUNDED.findall(text), _OPTIONAL.findall(text)
    return len(repeated) > MAX_UNBOUNDED or len(optional) > MAX_OPTIONAL


@functools.cache
def at_end(key: str) -> re.Pattern[str]:
    """A key of ``rank_pattern`` or ``alpha_pattern``, for paths that end with it.

    Kept, since some adapters have a key for each of a thousand modules: re keeps only 512.
    """
    return re.compile(rf"(.*\.)?({key})$")


@functools.cache
def whole(pattern: str) -> re.Pattern[str]:
    """``target_modules`` that is one regex, for whole paths."""
    return re.compile(rf"(?:{pattern})\Z")

"""adapter_config.json: read in full, so that no field that changes the arithmetic is missed."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from merge_core.errors import InputError, Problem, shortened
from merge_core.peft_fields import (
    FEATURE_FIELDS,
    INERT_FIELDS,
    PLAIN_INITS,
    READ_FIELDS,
    TUNERS,
)

T = TypeVar("T")

MAX_RANK, MAX_SCALE = 10**6, 10**9
"""Beyond anything that was ever trained; keeps hostile numbers out of the arithmetic below."""

_REPEATED_GROUP = re.compile(r"\)[+*{]")
_UNBOUNDED = re.compile(r"(?<!\\)[+*{]")
_OPTIONAL = re.compile(r"(?<![\\(+*}])\?")
MAX_PATTERN, MAX_UNBOUNDED, MAX_OPTIONAL = 1000, 3, 10
"""A pattern may take for ever to match if it repeats a group, and its time grows with the length
of a module's path to the power of its unbounded quantifiers. What selects modules needs neither."""

_NARROWING = ("exclude_modules", "layers_to_transform", "layers_pattern")

_NOT_YET = "Merge this adapter with PEFT's merge_and_unload for now"
_REPAIR = "Correct the value, or save the adapter again with PEFT"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraConfig:
    """The fields of a plain LoRA that decide its delta."""

    rank: int
    alpha: float
    rslora: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    fan_in_fan_out: bool
    targets: str | tuple[str, ...] = ()
    """``target_modules``; empty where other fields narrow it down, so that it says nothing."""

    def is_target(self, module: str) -> bool:
        """Whether the config says that ``module`` was trained (PEFT: a regex, or suffixes)."""
        if isinstance(self.targets, str):
            return self.targets != "" and _whole(self.targets).match(module) is not None
        return any(module == name or module.endswith(f".{name}") for name in self.targets)

    def resolve(self, module: str) -> tuple[int, float]:
        """Rank and scaling of ``module``, a path such as ``model.layers.0.self_attn.q_proj``.

        Scaling is alpha / r, or alpha / sqrt(r) for rsLoRA (arXiv:2312.03732), where r and alpha
        may each be overridden by the first pattern that matches.
        """
        rank = _first_match(self.rank_pattern, module, self.rank)
        alpha = _first_match(self.alpha_pattern, module, self.alpha)
        return rank, alpha / (math.sqrt(rank) if self.rslora else rank)

    def idle_patterns(self, modules: Iterable[str]) -> list[str]:
        """Keys of the two patterns that match none of ``modules``; a slip, more often than not."""
        paths = list(modules)
        return [
            f"{field} {key!r}"
            for field, pattern in (
                ("rank_pattern", self.rank_pattern),
                ("alpha_pattern", self.alpha_pattern),
            )
            for key in pattern
            if not any(map(_at_end(key).match, paths))
        ]


def read_config(fields: Mapping[str, Any], where: str) -> LoraConfig:
    """The config that ``fields`` describe.

    Raises:
        InputError: with every field that is malformed, unknown, or belongs to a feature that
            raymeld does not merge yet.
    """
    kind = fields.get("peft_type")
    if kind != "LORA":
        raise InputError([_other_tuner(kind, where)])
    problems = [*_unsupported(fields, where), *_unknown(fields, where), *_malformed(fields, where)]
    if problems:
        raise InputError(problems)
    return LoraConfig(
        rank=fields.get("r", 8),
        alpha=fields.get("lora_alpha", 8),
        rslora=fields.get("use_rslora") or False,
        rank_pattern=fields.get("rank_pattern") or {},
        alpha_pattern=fields.get("alpha_pattern") or {},
        fan_in_fan_out=fields.get("fan_in_fan_out") or False,
        targets=_targets(fields),
    )


def _targets(fields: Mapping[str, Any]) -> str | tuple[str, ...]:
    narrowed = any(fields.get(name) for name in _NARROWING)
    targets = fields.get("target_modules")
    if narrowed or not targets:
        return ()
    if isinstance(targets, str):
        return targets if _is_regex(targets) and targets != "all-linear" else ()
    return tuple(str(name) for name in targets) if isinstance(targets, list) else ()


def _first_match(pattern: Mapping[str, T], module: str, default: T) -> T:
    """PEFT's rule (``get_pattern_key``): keys are regexes, tried in the order of the file, which
    must match the whole path or a suffix of it that starts behind a dot.
    """
    for key, value in pattern.items():
        if _at_end(key).match(module):
            return value
    return default


@functools.cache
def _at_end(key: str) -> re.Pattern[str]:
    """Kept, since some adapters have a key for each of a thousand modules: re keeps only 512."""
    return re.compile(rf"(.*\.)?({key})$")


@functools.cache
def _whole(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"(?:{pattern})\Z")


def _other_tuner(kind: Any, where: str) -> Problem:
    if isinstance(kind, str) and kind in TUNERS:
        return Problem(f"peft_type {kind} is not merged yet, only LORA is", where, _NOT_YET)
    return Problem(f"peft_type is {shortened(kind)}, which is no PEFT type", where, _REPAIR)


def _unsupported(fields: Mapping[str, Any], where: str) -> list[Problem]:
    problems = [
        Problem(f"{feature} is not merged yet ({name} is set)", where, _NOT_YET)
        for name, feature in FEATURE_FIELDS.items()
        if fields.get(name)
    ]
    if fields.get("bias", "none") != "none":
        what = f"trained biases (bias={shortened(fields['bias'])}) are not merged yet"
        problems.append(Problem(what, where, _NOT_YET))
    init = fields.get("init_lora_weights", True)
    if str(init).lower() not in PLAIN_INITS:
        said = f"init_lora_weights={shortened(init)}"
        what = f"{said} may change the base weights that the factors refer to"
        remedy = (
            "Save the adapter again as plain LoRA: save_pretrained(...,"
            " path_initial_model_for_weight_conversion=...)"
        )
        problems.append(Problem(what, where, remedy))
    return problems


def _unknown(fields: Mapping[str, Any], where: str) -> list[Problem]:
    known = READ_FIELDS | INERT_FIELDS | FEATURE_FIELDS.keys()
    return [
        Problem(
            f"field {shortened(name)} = {shortened(value)} is not known and could change the"
            " arithmetic",
            where,
            "Use a newer raymeld, or remove the field if you know that it is inert",
        )
        for name, value in fields.items()
        if name not in known
        and value is not None
        and value is not False
        and value not in ("", [], {})
    ]


def _malformed(fields: Mapping[str, Any], where: str) -> list[Problem]:
    checks: tuple[tuple[str, Any, Callable[[Any], bool], str], ...] = (
        ("r", 8, _is_rank, "a whole number above 0"),
        ("lora_alpha", 8, _is_number, "a number other than 0"),
        ("use_rslora", False, _is_flag, "true or false"),
        ("fan_in_fan_out", False, _is_flag, "true or false"),
        ("rank_pattern", {}, lambda v: _is_pattern(v, _is_rank), "a map of regexes to ranks"),
        ("alpha_pattern", {}, lambda v: _is_pattern(v, _is_number), "a map of regexes to numbers"),
    )
    return [
        Problem(f"{name} is {shortened(fields[name])}, not {expected}", where, _REPAIR)
        for name, default, is_valid, expected in checks
        if not is_valid(fields.get(name, default))
    ]


def _is_rank(value: Any) -> bool:
    return type(value) is int and 0 < value <= MAX_RANK


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and 0 < abs(value) <= MAX_SCALE


def _is_flag(value: Any) -> bool:
    return value is None or type(value) is bool


def _is_pattern(value: Any, is_valid: Any) -> bool:
    if value is None:
        return True
    return isinstance(value, dict) and all(_is_regex(k) and is_valid(v) for k, v in value.items())


def _is_regex(text: str) -> bool:
    if len(text) > MAX_PATTERN or _REPEATED_GROUP.search(text):
        return False
    if len(_UNBOUNDED.findall(text)) > MAX_UNBOUNDED or len(_OPTIONAL.findall(text)) > MAX_OPTIONAL:
        return False
    try:
        _at_end(text)
    except (re.error, RecursionError, OverflowError):
        return False
    return True

"""The config of an adapter: which of its fields can be checked, and the scale that they make.

s = alpha / r, or alpha / sqrt(r) with ``use_rslora`` (``tuners/lora/layer.py`` in PEFT). r and
alpha are looked up for each module in ``rank_pattern`` and ``alpha_pattern``: the first key, in the
order of the file, that matches the end of the module's path (``utils/other.py``,
``get_pattern_key``).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from merge_core.errors import refuse
from merge_core.stores.location import Location
from merge_core.verify.places import read_bytes
from merge_core.verify.strict_json import MalformedError, parse_object

REMEDY = "Check this merge with --level digest"

_UNDERSTOOD = {"peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"}
_UNDERSTOOD |= {"fan_in_fan_out", "init_lora_weights", "use_dora", "lora_bias", "bias"}
_UNDERSTOOD |= {"modules_to_save", "trainable_token_indices", "token_indices"}
_UNDERSTOOD |= {"ensure_weight_tying", "target_parameters", "peft_version", "use_bdlora"}
_UNDERSTOOD |= {"layer_replication"}
_NO_EFFECT = {"task_type", "auto_mapping", "base_model_name_or_path", "revision"}
_NO_EFFECT |= {"inference_mode", "lora_dropout", "target_modules", "exclude_modules"}
_NO_EFFECT |= {"layers_to_transform", "layers_pattern", "loftq_config", "eva_config"}
_NO_EFFECT |= {"corda_config", "lora_ga_config", "megatron_config", "megatron_core"}
_NO_EFFECT |= {"qalora_group_size", "runtime_config", "velora_config", "monteclora_config"}
_NO_EFFECT |= {"init_weights"}
"""Fields that only steered the training; which modules were trained, the keys say.
Every other field must be absent, null, false or empty."""

TYPES = ("LORA", "TRAINABLE_TOKENS", "LN_TUNING")

_PLAIN_INITS = ("gaussian", "eva", "mica", "orthogonal")
"""Besides true and false. The other ways to initialise change the base weights too."""

_DEFAULT = 8
"""Of ``r`` and of ``lora_alpha``, where the config leaves them out."""

_EXPENSIVE = re.compile(r"\)[+*{]|(?:(?<!\\)[+*{].*){4}|(?:\?.*){11}", re.DOTALL)
"""A repeated group, or many quantifiers: matching such a pattern could take for ever."""


def read_fields(path: Location) -> dict[str, Any]:
    """The fields of an ``adapter_config.json``.

    Raises:
        InputError: it cannot be read.
    """
    try:
        return parse_object(read_bytes(path))
    except (OSError, MalformedError) as error:
        raise refuse(f"the adapter's config cannot be read ({error})", str(path), REMEDY) from error


def unsupported_fields(config: Mapping[str, Any]) -> Iterator[str]:
    """The fields that cannot be checked, with their values."""
    if config.get("peft_type") not in TYPES:
        yield f"peft_type {config.get('peft_type')!r}"
    for field, value in config.items():
        if field not in _UNDERSTOOD | _NO_EFFECT and value:
            yield f"{field} = {value!r}"
    init = config.get("init_lora_weights", True)
    if not isinstance(init, bool) and str(init).lower() not in _PLAIN_INITS:
        yield f"init_lora_weights = {init!r}"
    for field, patterns in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern")):
        found = config.get(patterns) or {}
        if not isinstance(found, dict) or not all(map(_is_regex, found)):
            yield f"{patterns} = {found!r}"
        elif not all(map(_is_number, (config.get(field, _DEFAULT), *found.values()))):
            yield f"{field} = {config.get(field)!r}, {patterns} = {found!r}"
    yield from _strange_lists(config)


def _strange_lists(config: Mapping[str, Any]) -> Iterator[str]:
    for field in ("trainable_token_indices", "token_indices"):
        value = config.get(field)
        lists = value.values() if isinstance(value, dict) else [value or []]
        if not all(isinstance(rows, list) and all(map(_is_row, rows)) for rows in lists):
            yield f"{field} = {value!r}"
    if config.get("use_bdlora") and config.get("use_dora"):
        yield "use_bdlora with use_dora"
    if not _is_bdlora(config.get("use_bdlora") or {}):
        yield f"use_bdlora = {config['use_bdlora']!r}"
    for field in ("modules_to_save", "target_parameters"):
        named = config.get(field) or []
        if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
            yield f"{field} = {named!r}"


def rank_of(config: Mapping[str, Any], module: str) -> float:
    """R of one module."""
    return _lookup(config, "r", "rank_pattern", module)


def scale_of(config: Mapping[str, Any], module: str) -> float:
    """S of one module, without the adapter's weight."""
    rank = rank_of(config, module)
    alpha = _lookup(config, "lora_alpha", "alpha_pattern", module)
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def tokens_of(config: Mapping[str, Any], module: str) -> list[int]:
    """The rows of ``module`` that were trained, in the order of the adapter's rows."""
    if config.get("peft_type") == "TRAINABLE_TOKENS":
        return list(config.get("token_indices") or [])
    given = config.get("trainable_token_indices") or []
    if not isinstance(given, dict):
        return list(given)
    return next((rows for name, rows in given.items() if f".{module}".endswith(f".{name}")), [])


def blocks_of(config: Mapping[str, Any], module: str) -> tuple[int, int]:
    """Of how many blocks A and B are (BD-LoRA); 1 where they are stored in full.

    Raises:
        MalformedError: PEFT would not have trained such a module.
    """
    given = config.get("use_bdlora")
    if not given:
        return 1, 1
    found = [
        any(name in module for name in given.get(f"target_modules_bd_{side}") or ())
        for side in "ab"
    ]
    if all(found) or (given.get("match_strict", True) and not any(found)):
        raise MalformedError(f"use_bdlora names {sum(found)} of its factors")
    a, b = (given.get("nblocks", 1) if named else 1 for named in found)
    return a, b


def saved_whole(config: Mapping[str, Any], module: str) -> bool:
    """Whether ``modules_to_save`` names ``module`` or one that it is part of."""
    ends = [position for position, sign in enumerate(f"{module}.") if sign == "."]
    return any(
        module[:end].endswith(n) for end in ends for n in config.get("modules_to_save") or ()
    )


def _is_bdlora(given: object) -> bool:
    if not isinstance(given, dict):
        return False
    rest = dict(given)
    lists = [rest.pop(f"target_modules_bd_{side}", None) or [] for side in "ab"]
    blocks, strict = rest.pop("nblocks", 1), rest.pop("match_strict", True)
    named = all(
        isinstance(names, list) and all(isinstance(n, str) for n in names) for names in lists
    )
    return named and not rest and type(blocks) is int and blocks > 0 and type(strict) is bool


def _is_number(value: object) -> bool:
    """A rank below 0 fits no factor, so it is found where the shapes are."""
    return isinstance(value, int | float) and not isinstance(value, bool) and value != 0


def _is_row(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_regex(pattern: str) -> bool:
    if len(pattern) > 1000 or _EXPENSIVE.search(pattern):
        return False
    try:
        re.compile(_at_end(pattern))
    except re.error:
        return False
    return True


def _lookup(config: Mapping[str, Any], field: str, patterns: str, module: str) -> float:
    for key, value in (config.get(patterns) or {}).items():
        if re.match(_at_end(key), module):
            return float(value)
    return float(config.get(field, _DEFAULT))


def _at_end(key: str) -> str:
    return rf"(.*\.)?({key})$"

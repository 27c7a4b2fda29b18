"""adapter_config.json: read in full, so that no field that changes the arithmetic is missed."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from merge_core.block_diagonal import BlockDiagonal, read_block_diagonal
from merge_core.config_values import are_names, at_end, malformed, malformed_tuner
from merge_core.errors import InputError, Problem, shortened
from merge_core.peft_fields import (
    INERT_FIELDS,
    NORM_FIELDS,
    PLAIN_INITS,
    READ_FIELDS,
    TOKEN_FIELDS,
)
from merge_core.peft_tuners import TUNERS, tuner_of
from merge_core.refused_tuners import REFUSED, REFUSED_VARIANTS
from merge_core.targets import Targets, read_targets
from merge_core.tuner import COMMON_FIELDS

T = TypeVar("T")

_READ = {"LORA": READ_FIELDS, "TRAINABLE_TOKENS": TOKEN_FIELDS, "LN_TUNING": NORM_FIELDS}

_REPAIR = "Save the adapter again with PEFT"
_CONVERT = (
    "Save the adapter again as plain LoRA: save_pretrained(...,"
    " path_initial_model_for_weight_conversion=...). LLaMA-Factory and ms-swift may have done so,"
    " in pissa_converted and converted/default"
)
_OF_LOFTQ = (
    "Give the base that LoftQ wrote, and set init_lora_weights to true: it is plain LoRA there"
)
"""Its start does not add up to the original base, so PEFT's conversion would not either."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterConfig:
    """The fields that decide what an adapter does."""

    peft_type: str
    """``LORA``, ``TRAINABLE_TOKENS``, ``LN_TUNING`` or a name in ``peft_tuners.TUNERS``."""
    rank: int = 8
    alpha: float = 8
    rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    """These five are of LoRA alone."""
    fan_in_fan_out: bool
    dora: bool = False
    lora_bias: bool = False
    """Whether B has a bias."""
    bias: str = "none"
    """Which biases of the base were trained: ``none``, ``all``, or those of the tuner's own layers,
    such as ``lora_only``."""
    saved: tuple[str, ...] = ()
    """``modules_to_save``: names of modules that were trained as a whole."""
    tokens: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Trained rows of embeddings, by the end of the module's path; the empty one is any."""
    ensures_tying: bool = False
    """Whether what was trained of tied embeddings was trained of the head as well."""
    replication: tuple[tuple[int, int], ...] = ()
    """``layer_replication``: ranges of the base's layers that the trained model consists of."""
    targets: Targets = field(default_factory=Targets)
    """``target_modules``, and what narrows it down."""
    parameters: tuple[str, ...] = ()
    """``target_parameters``: ends of the paths of parameters that were trained by themselves."""
    peft_release: tuple[int, int] | None = None
    """The release of PEFT that saved the adapter; None if it was none."""
    block_diagonal: BlockDiagonal | None = None
    """``use_bdlora``"""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """All of them, where PEFT is to read them."""

    def is_target(self, module: str) -> bool:
        """Whether the config says that ``module`` was trained."""
        return self.targets.covers(module)

    def is_parameter(self, path: str) -> bool:
        """Whether the parameter at ``path`` was trained by itself."""
        return any(path == name or path.endswith(f".{name}") for name in self.parameters)

    def key_of(self, module: str) -> str:
        """What the patterns are matched with, for the factors of a module's weight."""
        weight = f"{module}.weight"
        return weight if self.is_parameter(weight) else module

    def is_saved(self, module: str) -> bool:
        """Whether ``module`` was trained as a whole."""
        return any(saves(name, module) for name in self.saved)

    def trains_bias(self, *, beside_factors: bool) -> bool:
        """Whether the bias of a module that has factors, or has none, was trained."""
        return self.bias == "all" or (self.bias.endswith("_only") and beside_factors)

    def tokens_of(self, module: str) -> tuple[int, ...] | None:
        """The rows of ``module`` that were trained; None if the config names none."""
        for name, tokens in self.tokens.items():
            if name in ("", module) or module.endswith(f".{name}"):
                return tokens
        if self.peft_type == "TRAINABLE_TOKENS":  # those of a tied head are saved, and not named
            return next(iter(self.tokens.values()), None)
        return None

    def resolve(self, module: str) -> tuple[int, float]:
        """Rank and scaling of ``module``, a path such as ``model.layers.0.self_attn.q_proj``, or
        of a parameter that was trained by itself.

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
            if not any(map(at_end(key).match, paths))
        ]


def saves(name: str, module: str) -> bool:
    """Whether a name in ``modules_to_save`` is that of ``module``, or of one around it.

    PEFT wraps every module whose path ends with the name.
    """
    paths = module.split(".")
    return any(".".join(paths[: n + 1]).endswith(name) for n in range(len(paths)))


def read_config(fields: Mapping[str, Any], where: str) -> AdapterConfig:
    """The config that ``fields`` describe.

    Raises:
        InputError: with every field that is malformed, unknown, or belongs to a feature that
            raymeld does not merge.
    """
    kind = tuner_of(fields)
    if kind not in _READ.keys() | TUNERS.keys() or fields["peft_type"] == "KASA":
        raise InputError([_no_merge(fields.get("peft_type"), where)])
    own = kind in TUNERS
    problems = [
        *_unsupported(fields, where),
        *_unknown(fields, where),
        *(malformed_tuner(fields, where) if own else malformed(fields, where)),
    ]
    if problems:
        raise InputError(problems)
    return _of_tuner(fields) if own else _of_lora(fields)


def _of_tuner(fields: Mapping[str, Any]) -> AdapterConfig:
    return AdapterConfig(
        peft_type=tuner_of(fields),
        fan_in_fan_out=fields.get("fan_in_fan_out") or False,
        bias=fields.get("bias") or "none",
        saved=tuple(fields.get("modules_to_save") or ()),
        targets=read_targets(fields),
        fields=fields,
    )


def _of_lora(fields: Mapping[str, Any]) -> AdapterConfig:
    return AdapterConfig(
        peft_type=fields["peft_type"],
        rank=fields.get("r", 8),
        alpha=fields.get("lora_alpha", 8),
        rslora=fields.get("use_rslora") or False,
        rank_pattern=fields.get("rank_pattern") or {},
        alpha_pattern=fields.get("alpha_pattern") or {},
        fan_in_fan_out=fields.get("fan_in_fan_out") or False,
        dora=fields.get("use_dora") or False,
        lora_bias=fields.get("lora_bias") or False,
        bias=fields.get("bias") or "none",
        saved=tuple(fields.get("modules_to_save") or ()),
        tokens=_tokens(fields),
        ensures_tying=fields.get("ensure_weight_tying") or False,
        targets=Targets() if fields["peft_type"] == "TRAINABLE_TOKENS" else read_targets(fields),
        replication=tuple((start, end) for start, end in fields.get("layer_replication") or ()),
        parameters=tuple(fields.get("target_parameters") or ()),
        peft_release=_release(fields.get("peft_version")),
        block_diagonal=read_block_diagonal(fields.get("use_bdlora")),
    )


def _is_older_oft(fields: Mapping[str, Any]) -> bool:
    """Whether it is of an OFT whose series had other terms than the installed PEFT's, or may be."""
    exact = fields.get("use_cayley_neumann") is False
    release = _release(fields.get("peft_version"))
    return fields.get("peft_type") == "OFT" and not exact and (release or (0, 0)) < (0, 18)


def _release(version: Any) -> tuple[int, int] | None:
    """PEFT has written its version since 0.18."""
    if version is None:
        return (0, 17)
    match = re.fullmatch(r"(\d+)\.(\d+)(?:\.\d+)?", str(version))
    return (int(match[1]), int(match[2])) if match else None


def _tokens(fields: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """By the end of a module's path: a list without names is of the embeddings."""
    if fields.get("peft_type") == "TRAINABLE_TOKENS":
        modules = fields.get("target_modules")
        names = modules if isinstance(modules, list) and are_names(modules) else [""]
        return dict.fromkeys(names, tuple(fields.get("token_indices") or ()))
    given = fields.get("trainable_token_indices") or {}
    named = given if isinstance(given, dict) else {"": given}
    return {name: tuple(tokens) for name, tokens in named.items()}


def _first_match(pattern: Mapping[str, T], module: str, default: T) -> T:
    """PEFT's rule (``get_pattern_key``): keys are regexes, tried in the order of the file, which
    must match the whole path or a suffix of it that starts behind a dot.
    """
    for key, value in pattern.items():
        if at_end(key).match(module):
            return value
    return default


def _no_merge(kind: Any, where: str) -> Problem:
    if isinstance(kind, str) and kind in REFUSED:
        what = f"peft_type {kind} is not merged: {REFUSED[kind]}"
        return Problem(what, where, "Use it as an adapter, with PEFT")
    return Problem(f"peft_type is {shortened(kind)}, which is no PEFT type", where, _REPAIR)


def _unsupported(fields: Mapping[str, Any], where: str) -> list[Problem]:
    problems = [
        Problem(f"{name} is set: {why}", where, "Use it as an adapter, with PEFT")
        for name, why in REFUSED_VARIANTS.items()
        if fields.get(name)
    ]
    if fields.get("use_dora") and fields.get("use_bdlora"):
        what = "use_dora and use_bdlora are set, of which PEFT trains one at a time"
        problems.append(Problem(what, where, _REPAIR))
    if _is_older_oft(fields):
        what = (
            "use_cayley_neumann is not false: PEFT before 0.18 counted the last term of the series"
            f" twice, and peft_version is {shortened(fields.get('peft_version'))}"
        )
        problems.append(Problem(what, where, "Merge it with PEFT 0.17"))
    init = fields.get("init_lora_weights", True)
    if str(init).lower() not in PLAIN_INITS:
        said = f"init_lora_weights={shortened(init)}"
        what = f"{said} may change the base weights that the factors refer to"
        remedy = _OF_LOFTQ if str(init).lower() == "loftq" else _CONVERT
        problems.append(Problem(what, where, remedy))
    return problems


def _unknown(fields: Mapping[str, Any], where: str) -> list[Problem]:
    kind = tuner_of(fields)
    read = COMMON_FIELDS | TUNERS[kind].fields if kind in TUNERS else _READ[kind]
    known = read | INERT_FIELDS | REFUSED_VARIANTS.keys()
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

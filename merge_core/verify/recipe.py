"""What an adapter adds to which base tensor, worked out from its config and keys alone.

For a module with factors A [r, in] and B [out, r], PEFT adds ``s * B @ A`` to its weight, with
s = weight * alpha / r, or weight * alpha / sqrt(r) with ``use_rslora`` (``tuners/lora/layer.py``).
r and alpha are looked up for each module in ``rank_pattern`` and ``alpha_pattern``: the first key,
in the order of the file, that matches the end of the module's path (``utils/other.py``,
``get_pattern_key``). Anything that adds in another way is refused by name: this module must not
call a merge right that it has not understood.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merge_core.errors import InputError, Problem, refuse
from merge_core.verify.factors import Factors, RawTensor, open_factors, weights_path
from merge_core.verify.report import Finding
from merge_core.verify.strict_json import MalformedError, parse_object

_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<factor>[AB])\.weight")
_COPY = re.compile(r"base_model\.model\.(?P<module>.+)\.base_layer\.weight")
"""PEFT saves the base weight beside the factors when lm_head is a target."""

_REMEDY = "Check this merge with --level digest"

_UNDERSTOOD = {"peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"}
_UNDERSTOOD |= {"fan_in_fan_out", "init_lora_weights"}
_NO_EFFECT = {"task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"}
_NO_EFFECT |= {"inference_mode", "lora_dropout", "target_modules", "exclude_modules", "bias"}
_NO_EFFECT |= {"layers_to_transform", "layers_pattern", "loftq_config", "eva_config"}
_NO_EFFECT |= {"corda_config", "lora_ga_config", "megatron_config", "megatron_core"}
_NO_EFFECT |= {"qalora_group_size", "runtime_config"}
"""Fields that only steered the training; which modules and biases were trained, the keys
say, and a key of a bias is refused.
Every other field must be absent, null, false or empty."""

_PLAIN_INITS = ("gaussian", "eva", "orthogonal")
"""Besides true and false. The other ways to initialise change the base weights too."""

_LINEAR_ONLY = ("qwen2", "qwen2_moe")
"""Their layers are nn.Linear, for which PEFT ignores ``fan_in_fan_out``."""

_CONV1D = ("gpt2", "imagegpt", "openai-gpt", "decision_transformer")
"""Their layers are transformers' Conv1D, [in, out], whatever ``fan_in_fan_out`` says."""

_DEFAULT = 8
"""Of ``r`` and of ``lora_alpha``, where the config leaves them out."""

_EXPENSIVE = re.compile(r"\)[+*{]|(?:(?<!\\)[+*{].*){4}|(?:\?.*){11}", re.DOTALL)
"""A repeated group, or many quantifiers: matching such a pattern could take for ever."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """``scale * B @ A`` of one adapter, to be added to one base tensor."""

    path: str
    """Weights file of the adapter."""
    a: str
    """Key of A, [r, in]."""
    b: str
    """Key of B, [out, r]."""
    scale: float
    transposed: bool
    """Whether the base tensor is [in, out], as in Conv1D layers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Adapter:
    path: Path
    weight: float
    config: dict[str, Any]
    factors: Factors


def adapter_deltas(
    path: Path, weight: float, base: Mapping[str, tuple[int, ...]], model_type: object
) -> tuple[dict[str, Delta], list[Finding]]:
    """What the adapter at ``path``, counted ``weight`` times, adds to the tensors of ``base``.

    Args:
        path: the adapter's directory.
        weight: factor of this adapter in the sum.
        base: shape of each base tensor by name.
        model_type: ``model_type`` of the base's config.

    Returns:
        Delta by base tensor, and a finding for each adapter tensor that fits no base tensor.

    Raises:
        InputError: it has features that cannot be checked here; all are named.
    """
    config = _read_config(path / "adapter_config.json")
    factors = open_factors(str(weights_path(path)))
    problems = [*_unsupported_fields(config), *_unsupported_keys(factors)]
    if problems:
        where = str(path)
        raise InputError([Problem(f"cannot check {what}", where, _REMEDY) for what in problems])
    adapter = _Adapter(path=path, weight=weight, config=config, factors=factors)
    deltas, findings = {}, []
    keys = (_KEY.fullmatch(key) for key in factors.shapes)
    for module in sorted({match["module"] for match in keys if match}):
        try:
            deltas[f"{module}.weight"] = _delta(adapter, module, base, model_type)
        except MalformedError as error:
            where = f"{path}: {module}"
            findings.append(Finding(check="adapter", where=where, what=str(error)))
    return deltas, findings


def saved_copies(adapter: Path) -> dict[str, RawTensor]:
    """Base tensors that the adapter carries along, by name; they must equal the base's own."""
    factors = open_factors(str(weights_path(adapter)))
    matches = ((key, _COPY.fullmatch(key)) for key in factors.shapes)
    return {f"{m['module']}.weight": factors.raw(key) for key, m in matches if m}


def _read_config(path: Path) -> dict[str, Any]:
    try:
        return parse_object(path.read_bytes())
    except (OSError, MalformedError) as error:
        raise refuse(
            f"the adapter's config cannot be read ({error})", str(path), _REMEDY
        ) from error


def _unsupported_fields(config: Mapping[str, Any]) -> Iterator[str]:
    if config.get("peft_type") != "LORA":
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


def _is_number(value: object) -> bool:
    """A rank below 0 fits no factor, so it is found where the shapes are."""
    return isinstance(value, int | float) and not isinstance(value, bool) and value != 0


def _is_regex(pattern: str) -> bool:
    if len(pattern) > 1000 or _EXPENSIVE.search(pattern):
        return False
    try:
        re.compile(_at_end(pattern))
    except re.error:
        return False
    return True


def _unsupported_keys(factors: Factors) -> list[str]:
    """Keys that are no factor of a linear layer: DoRA, embeddings, biases, saved modules."""
    return [
        f"tensor {key!r}"
        for key in factors.shapes
        if not _KEY.fullmatch(key) and not _COPY.fullmatch(key)
    ]


def _delta(
    adapter: _Adapter, module: str, base: Mapping[str, tuple[int, ...]], model_type: object
) -> Delta:
    """Raises MalformedError if the module's factors do not fit their base tensor."""
    keys = [f"base_model.model.{module}.lora_{factor}.weight" for factor in "AB"]
    shapes = [adapter.factors.shapes.get(key) for key in keys]
    shape = base.get(f"{module}.weight")
    if shape is None:
        raise MalformedError(f"the base has no tensor '{module}.weight' to add it to")
    rank = _lookup(adapter.config, "r", "rank_pattern", module)
    a, b = shapes
    if a is None or b is None or len(a) != 2 or len(b) != 2 or (a[0], b[1]) != (rank, rank):
        raise MalformedError(f"A is {a}, B is {b}; the config says rank {rank:g}")
    transposed = _is_transposed(shape, (b[0], a[1]), adapter.config, model_type)
    alpha = _lookup(adapter.config, "lora_alpha", "alpha_pattern", module)
    divisor = math.sqrt(rank) if adapter.config.get("use_rslora") else rank
    return Delta(
        path=adapter.factors.path,
        a=keys[0],
        b=keys[1],
        scale=adapter.weight * alpha / divisor,
        transposed=transposed,
    )


def _lookup(config: Mapping[str, Any], field: str, patterns: str, module: str) -> float:
    for key, value in (config.get(patterns) or {}).items():
        if re.match(_at_end(key), module):
            return float(value)
    return float(config.get(field, _DEFAULT))


def _at_end(key: str) -> str:
    return rf"(.*\.)?({key})$"


def _is_transposed(
    shape: tuple[int, ...], product: tuple[int, int], config: Mapping[str, Any], model_type: object
) -> bool:
    """PEFT decides by the class of the layer, which the type of the model tells."""
    flag = bool(config.get("fan_in_fan_out")) and model_type not in _LINEAR_ONLY
    if product[0] != product[1]:
        transposed = shape == product[::-1] and model_type not in _LINEAR_ONLY
    elif flag and model_type not in _CONV1D:
        raise MalformedError("fan_in_fan_out is set: a square tensor does not tell which way it is")
    else:
        transposed = model_type in _CONV1D
    if shape != (product[::-1] if transposed else product):
        raise MalformedError(f"B @ A is {list(product)}, the base tensor is {list(shape)}")
    return transposed

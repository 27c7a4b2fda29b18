"""What an adapter does to which base tensor, worked out from its config and keys alone.

For a module with factors A [r, in] and B [out, r], PEFT adds ``s * B @ A`` to its weight, see
``adapter_fields`` for s. The other kinds are described with their records. Anything else is refused
by name: this module must not call a merge right that it has not understood.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from merge_core.errors import InputError, Problem
from merge_core.verify.adapter_fields import (
    REMEDY,
    rank_of,
    read_fields,
    scale_of,
    tokens_of,
    unsupported_fields,
)
from merge_core.verify.adapter_keys import (
    B_BIAS,
    BIAS,
    EMBEDDING_A,
    EMBEDDING_B,
    MAGNITUDE,
    SAVED_BIAS,
    SAVED_WEIGHT,
    TOKENS,
    WEIGHT,
    A,
    B,
    sort_keys,
)
from merge_core.verify.elsewhere import is_elsewhere, touched
from merge_core.verify.factors import Factors, open_factors, weights_path
from merge_core.verify.report import Finding
from merge_core.verify.same_values import same_values
from merge_core.verify.strict_json import MalformedError

_LINEAR_ONLY = ("qwen2", "qwen2_moe")
"""Their layers are nn.Linear, for which PEFT ignores ``fan_in_fan_out``."""

_CONV1D = ("gpt2", "imagegpt", "openai-gpt", "decision_transformer")
"""Their layers are transformers' Conv1D, [in, out], whatever ``fan_in_fan_out`` says."""


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
    """Whether the base tensor is [in, out], as in Conv1D layers and embeddings."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shift:
    """``scale * vector``, the bias of B, to be added to a bias."""

    path: str
    vector: str
    scale: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Decomposed:
    """DoRA: W becomes (1 - weight) W + weight m V / norm(V) with V = W + delta, where the norm is
    taken, and the magnitude m given, for each output.
    """

    delta: Delta
    magnitude: str
    """Key of m, [out]."""
    weight: float

    @property
    def path(self) -> str:
        """Weights file of the adapter."""
        return self.delta.path


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Rows of an embedding that are replaced."""

    path: str
    rows: str
    """Key of the new rows, one for each token."""
    tokens: tuple[int, ...]


Update = Delta | Shift | Decomposed | Rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """All that one adapter does."""

    config: Mapping[str, Any]
    factors: Factors
    updates: Mapping[str, tuple[Update, ...]]
    """By base tensor."""
    whole: Mapping[str, str]
    """Base tensor to the key of what takes its place."""
    unchecked: frozenset[str] = frozenset()
    """Base tensors that it changes in ways that are not worked out here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Module:
    """The tensors of one module, and where they lead."""

    path: str
    keys: Mapping[str, str]
    factors: Factors
    config: Mapping[str, Any]
    weight: float
    """Of the adapter."""
    sizes: Callable[[str], tuple[int, ...] | None]
    """Shape of a tensor of the result, by name."""
    model_type: object

    def shape(self, kind: str) -> tuple[int, ...] | None:
        """Of the adapter's tensor of that kind."""
        return self.factors.shapes[self.keys[kind]] if kind in self.keys else None

    def goal(self, name: str) -> tuple[int, ...]:
        """Shape of the base's weight or bias; raises MalformedError if there is none."""
        shape = self.sizes(f"{self.path}.{name}")
        if shape is None:
            raise MalformedError(f"the base has no tensor '{self.path}.{name}' to add it to")
        return shape


def adapter_recipe(
    path: Path, weight: float, base: Mapping[str, tuple[int, ...]], model_type: object
) -> tuple[Recipe, list[Finding]]:
    """What the adapter at ``path``, counted ``weight`` times, does to the tensors of ``base``.

    Args:
        path: the adapter's directory.
        weight: factor of this adapter in the sum.
        base: shape of each base tensor by name.
        model_type: ``model_type`` of the base's config.

    Returns:
        The recipe, and a finding for each module of the adapter that fits no base tensor.

    Raises:
        InputError: it has features that cannot be checked here; all are named.
    """
    config = read_fields(path / "adapter_config.json")
    if is_elsewhere(config):
        file = open_factors(str(weights_path(path)), any_dtype=True)
        names = touched(file.shapes, base, str(path))
        return Recipe(config=config, factors=file, updates={}, whole={}, unchecked=names), []
    factors = open_factors(str(weights_path(path)))
    modules, unknown = sort_keys(factors.shapes)
    problems = [*unsupported_fields(config), *(f"tensor {key!r}" for key in unknown)]
    if problems:
        where = str(path)
        raise InputError([Problem(f"cannot check {what}", where, REMEDY) for what in problems])
    whole: dict[str, str] = {}
    findings: list[Finding] = []
    for module, keys in modules.items():
        for kind, saved in ((WEIGHT, SAVED_WEIGHT), (BIAS, SAVED_BIAS)):
            key, twin = keys.get(kind), keys.get(saved)
            if key and twin and not same_values(factors.tensor(key), factors.tensor(twin)):
                what = f"{key!r} and {twin!r} should be the same"
                findings.append(Finding(check="adapter", where=str(path), what=what))
            if key or twin:
                whole[f"{module}.{kind}"] = key or twin or ""

    def sizes(name: str) -> tuple[int, ...] | None:
        return base.get(name) and (factors.shapes[whole[name]] if name in whole else base[name])

    updates: dict[str, tuple[Update, ...]] = {}
    for module, keys in sorted(modules.items()):
        held = _Module(
            path=module,
            keys=keys,
            factors=factors,
            config=config,
            weight=weight,
            sizes=sizes,
            model_type=model_type,
        )
        try:
            updates |= _updates(held)
        except MalformedError as error:
            where = f"{path}: {module}"
            findings.append(Finding(check="adapter", where=where, what=str(error)))
    recipe = Recipe(config=config, factors=factors, updates=updates, whole=whole)
    return recipe, findings


def _updates(module: _Module) -> dict[str, tuple[Update, ...]]:
    """Raises MalformedError if the module's tensors do not fit one another or the base's."""
    updates: dict[str, tuple[Update, ...]] = {}
    weight, bias = f"{module.path}.weight", f"{module.path}.bias"
    if TOKENS in module.keys:
        updates[weight] = (_rows(module),)
    if module.keys.keys() <= {TOKENS, WEIGHT, BIAS, SAVED_WEIGHT, SAVED_BIAS}:
        return updates
    embedding = EMBEDDING_A in module.keys or EMBEDDING_B in module.keys
    delta = _delta(module, embedding=embedding)
    magnitude, shift = module.shape(MAGNITUDE), module.shape(B_BIAS)
    out = (module.shape(EMBEDDING_B if embedding else B) or (0,))[0]
    for field, shape in (("use_dora", magnitude), ("lora_bias", shift)):
        wanted = (out,) if module.config.get(field) else None
        if shape != wanted and not (embedding and field == "lora_bias" and shape is None):
            raise MalformedError(f"{field} asks for a vector of {wanted}, there is {shape}")
    mine: Update = delta
    if magnitude is None:
        mine = replace(delta, scale=delta.scale * module.weight)
    else:
        mine = Decomposed(delta=delta, magnitude=module.keys[MAGNITUDE], weight=module.weight)
    updates[weight] = (*updates.get(weight, ()), mine)
    if shift is not None:
        if module.goal("bias") != shift:
            raise MalformedError(f"the bias of B is {shift}, the base's {module.goal('bias')}")
        scale = delta.scale * module.weight
        updates[bias] = (Shift(path=module.factors.path, vector=module.keys[B_BIAS], scale=scale),)
    return updates


def _rows(module: _Module) -> Rows:
    tokens, shape = tokens_of(module.config, module.path), module.shape(TOKENS)
    goal = module.goal("weight")
    if len(goal) != 2 or shape != (len(tokens), goal[1]) or max(tokens, default=0) >= goal[0]:
        raise MalformedError(f"rows of {shape} for {len(tokens)} tokens do not fit {goal}")
    if len(set(tokens)) != len(tokens):
        raise MalformedError("it names a token twice")
    return Rows(path=module.factors.path, rows=module.keys[TOKENS], tokens=tuple(tokens))


def _delta(module: _Module, *, embedding: bool) -> Delta:
    kinds = (EMBEDDING_A, EMBEDDING_B) if embedding else (A, B)
    shape, rank = module.goal("weight"), rank_of(module.config, module.path)
    a, b = (module.shape(kind) for kind in kinds)
    if a is None or b is None or len(a) != 2 or len(b) != 2 or (a[0], b[1]) != (rank, rank):
        raise MalformedError(f"A is {a}, B is {b}; the config says rank {rank:g}")
    product = (b[0], a[1])
    if embedding and shape != product[::-1]:
        what = f"B @ A is {list(product)}, the embedding is {list(shape)}, which is no transpose"
        raise MalformedError(what)
    return Delta(
        path=module.factors.path,
        a=module.keys[kinds[0]],
        b=module.keys[kinds[1]],
        scale=scale_of(module.config, module.path),
        transposed=embedding or _is_transposed(shape, product, module.config, module.model_type),
    )


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

"""What an adapter does to which base tensor, worked out from its config and keys alone.

Anything that is not known is refused by name: this module must not call a merge right that it has
not understood.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from merge_core.errors import InputError, Problem
from merge_core.stores.location import Location
from merge_core.verify.adapter_fields import (
    REMEDY,
    blocks_of,
    rank_of,
    read_fields,
    scale_of,
    tokens_of,
    unsupported_fields,
)
from merge_core.verify.adapter_keys import (
    B_BIAS,
    BIAS,
    DOWN,
    EMBEDDING_A,
    EMBEDDING_B,
    GATE_UP,
    MAGNITUDE,
    SAVED_BIAS,
    SAVED_WEIGHT,
    TOKENS,
    WEIGHT,
    A,
    B,
    sort_keys,
)
from merge_core.verify.elsewhere import beside_tuner, is_elsewhere, touched
from merge_core.verify.experts import (
    Part,
    is_parameter,
    is_swapped,
    parameter_of,
    parts_of,
    shape_of,
    span_of,
)
from merge_core.verify.factors import Factors, open_factors, weights_path
from merge_core.verify.report import Finding
from merge_core.verify.strict_json import MalformedError
from merge_core.verify.updates import Decomposed, Delta, Rows, Shift, Update
from merge_core.verify.weights import BaseTensor
from merge_core.verify.whole import Shapes, whole_tensors

_LINEAR_ONLY = ("qwen2", "qwen2_moe")
"""Their layers are nn.Linear, for which PEFT ignores ``fan_in_fan_out``."""

_CONV1D = ("gpt2", "imagegpt", "openai-gpt", "decision_transformer")
"""Their layers are transformers' Conv1D, [in, out], whatever ``fan_in_fan_out`` says."""


_WHOLE = (WEIGHT, BIAS, SAVED_WEIGHT, SAVED_BIAS, GATE_UP, DOWN)
"""See ``whole``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """All that one adapter does."""

    config: Mapping[str, Any]
    factors: Factors
    updates: Mapping[str, tuple[Update, ...]]
    """By base tensor."""
    whole: Mapping[str, BaseTensor]
    """What takes the place of which base tensor."""
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


def _elsewhere(
    path: Location, config: Mapping[str, Any], base: Shapes, model_type: object
) -> tuple[Recipe, list[Finding]]:
    """Of an adapter that PEFT merges: what it brings as a whole, and what nobody here can check."""
    file = open_factors(weights_path(path), any_dtype=True)
    modules, others = beside_tuner(file.shapes, base)
    whole, findings = whole_tensors(modules, file, str(path), base, model_type)
    names = touched(others, base, str(path))
    return Recipe(config=config, factors=file, updates={}, whole=whole, unchecked=names), findings


def adapter_recipe(
    path: Location, weight: float, base: Shapes, model_type: object
) -> tuple[Recipe, list[Finding]]:
    """What the adapter at ``path``, counted ``weight`` times, does to the tensors of ``base``.

    Args:
        path: the adapter's folder.
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
        return _elsewhere(path, config, base, model_type)
    factors = open_factors(weights_path(path))
    modules, unknown = sort_keys(factors.shapes)
    problems = [*unsupported_fields(config), *(f"tensor {key!r}" for key in unknown)]
    if problems:
        where = str(path)
        raise InputError([Problem(f"cannot check {what}", where, REMEDY) for what in problems])
    whole, findings = whole_tensors(modules, factors, str(path), base, model_type)

    def sizes(name: str) -> tuple[int, ...] | None:
        return base.get(name) and (whole[name].entry.shape if name in whole else base[name])

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
            for name, found in _updates(held).items():
                updates[name] = (*updates.get(name, ()), *found)
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
    if module.keys.keys() <= {TOKENS, *_WHOLE}:
        return updates
    parameter = parameter_of(module.path, module.config)
    if parameter is not None:
        return _expert_updates(module, parameter)
    embedding = EMBEDDING_A in module.keys or EMBEDDING_B in module.keys
    delta = _delta(module, embedding=embedding)
    spanned = span_of(module.path, module.sizes, module.model_type)
    if spanned is not None:
        weight = spanned[0]
    magnitude, shift = _vectors(module, embedding=embedding)
    mine: Update = delta
    if magnitude is None:
        mine = replace(delta, scale=delta.scale * module.weight)
    elif spanned is not None:
        raise MalformedError("DoRA on one of the experts that share a tensor is not known")
    else:
        mine = Decomposed(delta=delta, magnitude=module.keys[MAGNITUDE], weight=module.weight)
    updates[weight] = (*updates.get(weight, ()), mine)
    if shift is not None:
        if module.goal("bias") != shift:
            raise MalformedError(f"the bias of B is {shift}, the base's {module.goal('bias')}")
        scale = delta.scale * module.weight
        updates[bias] = (Shift(path=module.factors.path, vector=module.keys[B_BIAS], scale=scale),)
    return updates


def _vectors(
    module: _Module, *, embedding: bool
) -> tuple[tuple[int, ...] | None, tuple[int, ...] | None]:
    """Shapes of the magnitudes and of the bias of B, which are there as the config says."""
    magnitude, shift = module.shape(MAGNITUDE), module.shape(B_BIAS)
    out = (module.shape(EMBEDDING_B if embedding else B) or (0,))[0]
    for field, shape in (("use_dora", magnitude), ("lora_bias", shift)):
        wanted = (out,) if module.config.get(field) else None
        if shape != wanted and not (embedding and field == "lora_bias" and shape is None):
            raise MalformedError(f"{field} asks for a vector of {wanted}, there is {shape}")
    return magnitude, shift


def _rows(module: _Module) -> Rows:
    tokens, shape = tokens_of(module.config, module.path), module.shape(TOKENS)
    goal = module.goal("weight")
    if len(goal) != 2 or shape != (len(tokens), goal[1]) or max(tokens, default=0) >= goal[0]:
        raise MalformedError(f"rows of {shape} for {len(tokens)} tokens do not fit {goal}")
    if len(set(tokens)) != len(tokens):
        raise MalformedError("it names a token twice")
    return Rows(path=module.factors.path, rows=module.keys[TOKENS], tokens=tuple(tokens))


def _expert_updates(module: _Module, parameter: str) -> dict[str, tuple[Update, ...]]:
    """Of factors that all experts of a layer share."""
    if set(module.keys) != {A, B} or module.config.get("use_dora"):
        raise MalformedError(f"it has {sorted(module.keys)}, of which parameters have A and B")
    (rows, width), (out, columns) = (module.shape(kind) or () for kind in (A, B))
    rank, sizes = rank_of(module.config, parameter), module.sizes
    shape = shape_of(parameter, sizes, module.model_type)
    if not rows == columns == rank * shape[0]:
        what = f"A has {rows} rows, B {columns} columns; the config says rank {rank:g} of"
        raise MalformedError(f"{what} {shape[0]} experts")
    delta = Delta(
        path=module.factors.path,
        a=module.keys[A],
        b=module.keys[B],
        scale=scale_of(module.config, parameter) * module.weight,
        transposed=is_swapped((out, width), shape[1:], module.config),
    )
    updates: dict[str, tuple[Update, ...]] = {}
    for name, part in parts_of(parameter, sizes, module.model_type):
        updates[name] = (*updates.get(name, ()), replace(delta, part=part))
    return updates


def _delta(module: _Module, *, embedding: bool) -> Delta:
    kinds = (EMBEDDING_A, EMBEDDING_B) if embedding else (A, B)
    spanned = span_of(module.path, module.sizes, module.model_type)
    shape = module.goal("weight") if spanned is None else spanned[2]
    by_itself = is_parameter(module.config, f"{module.path}.weight")
    path = f"{module.path}.weight" if by_itself else module.path
    rank = rank_of(module.config, path)
    plain = embedding or by_itself
    blocks = (1, 1) if plain else blocks_of(module.config, module.path)
    a, b = (_unfolded(module.shape(kind), n) for kind, n in zip(kinds, blocks, strict=True))
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
        scale=scale_of(module.config, path),
        transposed=embedding or _is_transposed(shape, product, module, by_itself=by_itself),
        blocks=blocks,
        part=Part(span=None if spanned is None else spanned[1]),
    )


def _unfolded(shape: tuple[int, ...] | None, blocks: int) -> tuple[int, ...] | None:
    """Shape of the whole of a matrix of which the blocks are stored."""
    if shape is None or len(shape) != 2 or shape[0] % blocks:
        return None
    return shape[0], shape[1] * blocks


def _is_transposed(
    shape: tuple[int, ...], product: tuple[int, int], module: _Module, *, by_itself: bool
) -> bool:
    """PEFT decides by the class of the layer, which the type of the model tells; a parameter that
    was trained by itself is taken as it lies.
    """
    model_type = None if by_itself else module.model_type
    flag = bool(module.config.get("fan_in_fan_out")) and model_type not in _LINEAR_ONLY
    if product[0] != product[1]:
        transposed = shape == product[::-1] and model_type not in _LINEAR_ONLY
    elif flag and model_type not in _CONV1D:
        raise MalformedError("fan_in_fan_out is set: a square tensor does not tell which way it is")
    else:
        transposed = model_type in _CONV1D
    if shape != (product[::-1] if transposed else product):
        raise MalformedError(f"B @ A is {list(product)}, the base tensor is {list(shape)}")
    return transposed

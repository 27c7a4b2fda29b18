"""The weights of experts in a base: one tensor for each, or one for all experts of a layer.

Qwen1.5-MoE is published with a tensor for each layer of each expert, as older transformers had them
as modules. From version 5 transformers has all of a layer's experts in two parameters, and may save
them like that. Adapters come in both ways, and go to either kind of base: expert by expert.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from merge_core.adapter_config import AdapterConfig
from merge_core.errors import refuse
from merge_core.expert_factors import EXPERT_PARAMETERS, ExpertFactors, holds_experts
from merge_core.layout import TensorSpec
from merge_core.plan import Source
from merge_core.updates import Factor

FUSED_MODELS = frozenset({"qwen2_moe"})
"""Models whose fused experts are known: names, order of registration, and [experts, out, in]."""

_OTHER_BASE = "Give the base that this adapter was trained on"
_SWAPPED_BEFORE = (0, 19)
"""PEFT until then took every parameter for [experts, in, out], so that A and B of Qwen's have the
sizes of each other (``lora.ParamWrapper``, PEFT's pull request 3165)."""

_EXPERT = re.compile(r"(?P<module>.+\.experts)\.(?P<number>0|[1-9]\d*)\.(?P<layer>[^.]+)\.weight")


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a weight lies in the base."""

    name: str
    """Of the tensor."""
    tensor: TensorSpec
    """It, or what an adapter brings in its place."""
    first: int | None
    """Its first row in a tensor that others share; None: the tensor is all its own."""
    shape: tuple[int, ...]
    """Of the weight: [out, in] in a shared tensor."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertDelta:
    """The factors of one layer of one expert."""

    weight: str
    """Its weight's name where each expert has tensors of its own."""
    a: Factor
    b: Factor
    transposed: bool
    """Whether B @ A is [in, out]."""


def place_of(weight: str, sources: Mapping[str, Source], model: object) -> Place | None:
    """Where ``weight`` is, by its name where each expert has tensors of its own.

    Args:
        model: ``model_type`` of the base.
    """
    if weight in sources:
        tensor = sources[weight].tensor
        return Place(name=weight, tensor=tensor, first=None, shape=tensor.shape)
    match = _EXPERT.fullmatch(weight)
    if match is None or model not in FUSED_MODELS:
        return None
    module, number, layer = match.groups()
    for parameter, layers in EXPERT_PARAMETERS.items():
        name = f"{module}.{parameter}"
        fused = sources.get(name)
        if fused is not None and layer in layers and int(number) < fused.tensor.shape[0]:
            _, out, width = fused.tensor.shape
            rows = out // len(layers)
            first = int(number) * out + layers.index(layer) * rows
            return Place(name=name, tensor=fused.tensor, first=first, shape=(rows, width))
    return None


def is_parameter_of_experts(name: str) -> bool:
    """Whether ``name`` is that of a parameter with all experts of a layer."""
    module, _, parameter = name.rpartition(".")
    return holds_experts(module) and parameter in EXPERT_PARAMETERS


def pieces_of(
    parameter: str, stored: TensorSpec, sources: Mapping[str, Source], model: object
) -> Iterator[tuple[str, TensorSpec]]:
    """The weight of each layer of each expert, and the part of ``stored`` that is it.

    Args:
        stored: the whole parameter, [experts, out, in].
        sources: of a base with a tensor for each expert.
        model: ``model_type`` of the base.

    Raises:
        InputError: the base has no such experts, or others.
    """
    _check_known(parameter, model)
    shape = _shape_of(parameter, sources)
    if stored.shape != shape:
        what = f"is {list(stored.shape)}, the weights of the base together are {list(shape)}"
        raise refuse(what, f"tensor {stored.name!r}", _OTHER_BASE)
    module, _, name = parameter.rpartition(".")
    (experts, out, width), layers = shape, EXPERT_PARAMETERS[name]
    nbytes = stored.nbytes // experts // len(layers)
    weights = (f"{module}.{e}.{layer}.weight" for e in range(experts) for layer in layers)
    for number, weight in enumerate(weights):
        piece = replace(
            stored,
            shape=(out // len(layers), width),
            offset=stored.offset + number * nbytes,
            nbytes=nbytes,
        )
        yield weight, piece


def deltas_of(
    parameter: str,
    factors: ExpertFactors,
    sources: Mapping[str, Source],
    config: AdapterConfig,
    model: object,
) -> Iterator[ExpertDelta]:
    """What the factors of a parameter do to each layer of each expert.

    Args:
        model: ``model_type`` of the base.

    Raises:
        InputError: the base has no such experts, or others.
    """
    _check_known(parameter, model)
    module, _, name = parameter.rpartition(".")
    layers, at = EXPERT_PARAMETERS[name], f"parameter {parameter}"
    experts, out, width = _shape_of(parameter, sources)
    if experts != factors.experts:
        what = f"lora_A is of {factors.experts} experts with rank {factors.rank}"
        raise refuse(f"{what}, the base has {experts}", at, _OTHER_BASE)
    swapped = _is_swapped(factors, (out, width), config, at)
    for expert in range(experts):
        rows = (expert * factors.rank, (expert + 1) * factors.rank, 1)
        columns = (expert, factors.rank * experts, experts)
        for number, layer in enumerate(layers):
            size = out // len(layers)
            half = (number * size, (number + 1) * size, 1) if len(layers) > 1 else None
            a = Factor(tensor=factors.a, rows=rows, columns=half if swapped else None)
            b = Factor(tensor=factors.b, rows=None if swapped else half, columns=columns)
            weight = f"{module}.{expert}.{layer}.weight"
            yield ExpertDelta(weight=weight, a=a, b=b, transposed=swapped)


def _check_known(parameter: str, model: object) -> None:
    if model not in FUSED_MODELS:
        what = f"trained by itself, and of {model!r} nothing tells which way it lies"
        raise refuse(what, f"parameter {parameter}", "Merge it with PEFT's merge_and_unload")


def _shape_of(parameter: str, sources: Mapping[str, Source]) -> tuple[int, int, int]:
    """[experts, out, in] of a parameter, be it in the base or not."""
    if parameter in sources:
        experts, out, width = sources[parameter].tensor.shape
        return experts, out, width
    module, _, name = parameter.rpartition(".")
    layers, experts = EXPERT_PARAMETERS[name], 0
    while f"{module}.{experts}.{layers[0]}.weight" in sources:
        experts += 1
    if not experts:
        raise refuse(f"the base has no {parameter}", f"module {module}", _OTHER_BASE)
    rows, width = sources[f"{module}.0.{layers[0]}.weight"].tensor.shape
    return experts, rows * len(layers), width


def _is_swapped(
    factors: ExpertFactors, shape: tuple[int, int], config: AdapterConfig, at: str
) -> bool:
    """Whether the product of an expert's factors is the transpose of its weights' delta."""
    product = (factors.b.shape[0], factors.a.shape[1])
    if product not in (shape, shape[::-1]):
        what = f"the delta of an expert is {list(product)}, its weights are {list(shape)}"
        raise refuse(what, at, _OTHER_BASE)
    if shape[0] != shape[1]:
        return product != shape
    if config.peft_release is None:
        what = "nothing tells which way the factors lie: the weights are square, and peft_version"
        remedy = "Write the release of PEFT that saved the adapter into its adapter_config.json"
        raise refuse(f"{what} is of no release", at, remedy)
    return config.peft_release < _SWAPPED_BEFORE

"""The tensors that an adapter brings as a whole."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from merge_core.verify.adapter_keys import BIAS, DOWN, GATE_UP, SAVED_BIAS, SAVED_WEIGHT, WEIGHT
from merge_core.verify.experts import parts_of, shape_of, slab
from merge_core.verify.factors import Factors
from merge_core.verify.report import Finding
from merge_core.verify.same_values import same_values
from merge_core.verify.strict_json import MalformedError
from merge_core.verify.weights import BaseTensor

Shapes = Mapping[str, tuple[int, ...]]


def whole_tensors(
    modules: Mapping[str, Mapping[str, str]],
    factors: Factors,
    where: str,
    base: Shapes,
    model_type: object,
) -> tuple[dict[str, BaseTensor], list[Finding]]:
    """What takes the place of which base tensor; and what was saved twice and differs, or fits
    nowhere.

    Args:
        modules: kind to key, by the path of the module.
        where: the adapter, for messages.
        base: shape of each base tensor by name.
        model_type: ``model_type`` of the base's config.
    """
    whole: dict[str, BaseTensor] = {}
    findings: list[Finding] = []
    for module, keys in modules.items():
        for kind, saved in ((WEIGHT, SAVED_WEIGHT), (BIAS, SAVED_BIAS)):
            key, twin = keys.get(kind), keys.get(saved)
            if key and twin and not same_values(factors.tensor(key), factors.tensor(twin)):
                what = f"{key!r} and {twin!r} should be the same"
                findings.append(Finding(check="adapter", where=where, what=what))
            if key or twin:
                whole[f"{module}.{kind}"] = factors.tensor(key or twin or "")
        for kind in keys.keys() & {GATE_UP, DOWN}:
            try:
                brought = factors.tensor(keys[kind])
                whole |= _of_experts(f"{module}.{kind}", brought, base, model_type)
            except MalformedError as error:
                at = f"{where}: {keys[kind]}"
                findings.append(Finding(check="adapter", where=at, what=str(error)))
    return whole, findings


def _of_experts(
    parameter: str, brought: BaseTensor, base: Shapes, model_type: object
) -> Iterator[tuple[str, BaseTensor]]:
    """A parameter as it is, or its parts where each expert has tensors of its own.

    Raises:
        MalformedError: the base has no such experts, or others.
    """
    if parameter in base:
        yield parameter, brought
        return
    shape, entry = shape_of(parameter, base.get, model_type), brought.entry
    if entry.shape != shape:
        raise MalformedError(f"it is {entry.shape}, the weights of the base together are {shape}")
    for name, part in parts_of(parameter, base.get, model_type):
        (expert, _), (first, stop) = part.expert or (0, 0), part.rows or (0, 0)
        rows = slab(entry, expert * shape[1] + first, expert * shape[1] + stop)
        yield name, replace(brought, entry=replace(rows, name=entry.name))

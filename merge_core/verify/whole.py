"""The tensors that an adapter brings as a whole."""

from __future__ import annotations

from collections.abc import Mapping

from merge_core.verify.adapter_keys import BIAS, SAVED_BIAS, SAVED_WEIGHT, WEIGHT
from merge_core.verify.factors import Factors
from merge_core.verify.report import Finding
from merge_core.verify.same_values import same_values


def whole_tensors(
    modules: Mapping[str, Mapping[str, str]], factors: Factors, where: str
) -> tuple[dict[str, str], list[Finding]]:
    """Base tensor to the key of what takes its place, and those that were saved twice and differ.

    Args:
        modules: kind to key, by the path of the module.
        where: the adapter, for messages.
    """
    whole: dict[str, str] = {}
    findings: list[Finding] = []
    for module, keys in modules.items():
        for kind, saved in ((WEIGHT, SAVED_WEIGHT), (BIAS, SAVED_BIAS)):
            key, twin = keys.get(kind), keys.get(saved)
            if key and twin and not same_values(factors.tensor(key), factors.tensor(twin)):
                what = f"{key!r} and {twin!r} should be the same"
                findings.append(Finding(check="adapter", where=where, what=what))
            if key or twin:
                whole[f"{module}.{kind}"] = key or twin or ""
    return whole, findings

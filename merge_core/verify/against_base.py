"""Pairs each output tensor with its base tensor and its deltas, from headers and configs alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from merge_core.errors import InputError, Problem, gathered, refuse
from merge_core.verify.header import TensorEntry
from merge_core.verify.ledger import Row
from merge_core.verify.recipe import Delta, adapter_deltas, saved_copies
from merge_core.verify.report import Finding, at
from merge_core.verify.rounding import FLOATS, stored, to_float32
from merge_core.verify.strict_json import MalformedError, parse_object
from merge_core.verify.structure import RECORD, Structure
from merge_core.verify.weights import BaseTensor, open_base

WeightedAdapter = tuple[Path, float]
_COPY_ELEMENTS = 4 << 20
"""Of a saved copy that are compared at a time: 16 MB as float32."""

_PLAN = f"{RECORD}/plan.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What one output tensor must be equal to."""

    tensor: str
    base: BaseTensor
    deltas: tuple[Delta, ...]
    """What the adapters add; empty for a tensor that must be the base's own."""


def parse_weighted(text: str) -> WeightedAdapter:
    """``path@0.5`` as path and weight; 1 without a number, or where the whole text is a path."""
    path, _, number = text.rpartition("@")
    try:
        weight = float(number) if path and not Path(text).exists() else math.nan
    except ValueError:
        weight = math.nan
    return (Path(path), weight) if math.isfinite(weight) else (Path(text), 1.0)


def refuse_unchecked(base: Path, adapters: Sequence[WeightedAdapter]) -> None:
    """Raise what level numeric would raise over base and adapters, before there is a result.

    Raises:
        InputError: they cannot be read, or hold features that cannot be checked.
    """
    _all_deltas(open_base(base), _model_type(base), adapters)


def resolve_sources(
    out: Path, base: Path | None, adapters: Sequence[WeightedAdapter] | None
) -> tuple[Path, tuple[WeightedAdapter, ...]]:
    """Base and adapters to compare with, absolute: as given, else as the plan in ``out`` has them.

    Raises:
        InputError: something is neither given nor in the plan.
    """
    if base is None or adapters is None:
        planned_base, planned_adapters = _planned_sources(out / _PLAN)
        base = planned_base if base is None else base
        adapters = planned_adapters if adapters is None else adapters
    # Workers may run in another directory.
    return base.absolute(), tuple((path.absolute(), weight) for path, weight in adapters)


def _planned_sources(plan_path: Path) -> tuple[Path, list[WeightedAdapter]]:
    try:
        plan = parse_object(plan_path.read_bytes())
        adapters = [(Path(item["path"]), float(item["weight"])) for item in plan["adapters"]]
        return Path(plan["base"]), adapters
    except (OSError, MalformedError, KeyError, TypeError, ValueError) as error:
        what = f"level numeric needs base and adapters, and the plan cannot tell them ({error!r})"
        raise refuse(what, str(plan_path), "Give --base and --adapter") from error


def pair_with_base(
    structure: Structure, base: Path, adapters: Sequence[WeightedAdapter]
) -> tuple[dict[str, tuple[Comparison, ...]], list[Finding]]:
    """What to compare each tensor of ``structure`` with.

    Returns:
        Comparisons by weight file; and findings for tensors of the output, the base or an adapter
        that have no counterpart of the same shape, or that the ledger calls something else.

    Raises:
        InputError: base or adapters cannot be read, or hold features that cannot be checked.
    """
    tensors, model_type = open_base(base), _model_type(base)
    deltas, findings = _all_deltas(tensors, model_type, adapters)
    comparisons: dict[str, tuple[Comparison, ...]] = {}
    seen: set[str] = set()
    for file, entries in structure.headers.items():
        pairs = []
        for entry in entries:
            seen.add(entry.name)
            mine = tuple(deltas.get(entry.name, ()))
            wrong = _mismatch(entry, tensors.get(entry.name), mine)
            if wrong is None:
                pairs.append(Comparison(tensor=entry.name, base=tensors[entry.name], deltas=mine))
                findings += _action(file, entry, pairs[-1], structure.rows or {})
            else:
                findings.append(Finding(check="base", where=at(file, entry.name), what=wrong))
        comparisons[file] = tuple(pairs)
    # With an unreadable header the tensors in it only look as if they were missing.
    if len(structure.headers) == len(structure.files):
        findings += _missing(tensors, seen)
    return comparisons, findings


def _model_type(base: Path) -> object:
    try:
        return parse_object((base / "config.json").read_bytes(), constants=True).get("model_type")
    except (OSError, MalformedError) as error:
        what = f"the base's config cannot be read ({error})"
        raise refuse(what, str(base), "Name the base that was merged with --base") from error


def _all_deltas(
    tensors: Mapping[str, BaseTensor], model_type: object, adapters: Sequence[WeightedAdapter]
) -> tuple[dict[str, list[Delta]], list[Finding]]:
    """Deltas by base tensor, in the order of the adapters; every adapter's problems at once."""
    shapes = {name: tensor.entry.shape for name, tensor in tensors.items()}
    deltas: dict[str, list[Delta]] = {}
    findings: list[Finding] = []
    problems: list[Problem] = []
    for path, weight in adapters:
        with gathered(problems):
            found, unmatched = adapter_deltas(path, weight, shapes, model_type)
            findings += unmatched
            findings += _differing_copies(path, tensors)
            for tensor, delta in found.items():
                deltas.setdefault(tensor, []).append(delta)
    if problems:
        raise InputError(problems)
    return deltas, findings


def _differing_copies(adapter: Path, tensors: Mapping[str, BaseTensor]) -> Iterator[Finding]:
    """A base tensor that the adapter carries along replaces the base's, if it is another one."""
    for name, (copy, dtype) in saved_copies(adapter).items():
        base = tensors.get(name)
        if base is None or not _same_values(copy, dtype, base):
            what = f"the adapter carries another {name!r} than the base"
            yield Finding(check="adapter", where=str(adapter), what=what)


def _same_values(copy: npt.NDArray[np.uint8], dtype: str, base: BaseTensor) -> bool:
    entry = base.entry
    if not {dtype, entry.dtype} <= set(FLOATS):
        return False
    mapped = np.memmap(base.path, np.uint8, "r", offset=entry.start, shape=(entry.nbytes,))
    mine, old = stored(copy, dtype), stored(mapped, entry.dtype)
    return len(mine) == len(old) and all(
        np.array_equal(
            to_float32(mine[first : first + _COPY_ELEMENTS], dtype),
            to_float32(old[first : first + _COPY_ELEMENTS], entry.dtype),
            equal_nan=True,
        )
        for first in range(0, len(mine), _COPY_ELEMENTS)
    )


def _mismatch(entry: TensorEntry, base: BaseTensor | None, deltas: tuple[Delta, ...]) -> str | None:
    """Why the output tensor cannot be compared with ``base``."""
    if base is None:
        return "the base has no such tensor"
    old = base.entry
    if entry.shape != old.shape:
        return f"its shape is {list(entry.shape)}, the base's is {list(old.shape)}"
    if (deltas or entry.dtype != old.dtype) and not {entry.dtype, old.dtype} <= set(FLOATS):
        return f"{old.dtype} in the base, {entry.dtype} here: only {', '.join(FLOATS)} can change"
    return None


def _action(
    file: str, entry: TensorEntry, comparison: Comparison, rows: Mapping[str, Row]
) -> Iterator[Finding]:
    """The ledger must call the tensor what the adapters and the dtypes make it."""
    row = rows.get(entry.name)
    same_dtype = entry.dtype == comparison.base.entry.dtype
    action = "merged" if comparison.deltas else "copied" if same_dtype else "converted"
    if row is not None and row.action != action:
        what = f"the ledger says {row.action}, base and adapters make it {action}"
        yield Finding(check="ledger", where=at(file, entry.name), what=what)


def _missing(tensors: Mapping[str, BaseTensor], seen: set[str]) -> Iterator[Finding]:
    for name in sorted(tensors.keys() - seen):
        what = "the base has it, the output has not"
        yield Finding(check="base", where=name, what=what)

"""Where each tensor of the adapters went, as the plan accounts for them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from cluster.explain import KINDS
from cluster.report.evidence import Evidence
from cluster.report.tables import Column, Table

_SHARED = "read by all layers of the tuner, or compared with a tensor that it is tied to"


@dataclass(frozen=True, slots=True, kw_only=True)
class Use:
    """What one tensor of an adapter is used for."""

    adapter: int
    key: str
    kind: str
    targets: tuple[str, ...]
    """Tensors of the result."""


def uses(evidence: Evidence) -> list[Use]:
    """Every tensor of every adapter, in the order of the adapters and of their names."""
    targets: dict[tuple[int, str], dict[str, str]] = {}
    for task in evidence.tasks:
        for adapter, key, kind in _read(task):
            targets.setdefault((adapter, key), {})[task["target"]["name"]] = kind
    known = {
        (number, key)
        for number, adapter in enumerate(evidence.plan["adapters"])
        for key in adapter.get("tensors", ())
    }
    return [
        Use(
            adapter=adapter,
            key=key,
            kind=next(iter(targets.get((adapter, key), {}).values()), _SHARED),
            targets=tuple(targets.get((adapter, key), ())),
        )
        for adapter, key in sorted(known | targets.keys())
    ]


def summary(found: list[Use]) -> list[tuple[int, str, int, int]]:
    """For each adapter and kind: how many tensors of the adapter, for how many of the result."""
    keys = Counter((use.adapter, use.kind) for use in found)
    reached: dict[tuple[int, str], set[str]] = {}
    for use in found:
        reached.setdefault((use.adapter, use.kind), set()).update(use.targets)
    return [(*place, count, len(reached[place])) for place, count in sorted(keys.items())]


def key_table(found: list[Use], evidence: Evidence) -> Table:
    """Each tensor of the adapters, where it went, and whether that is done."""
    done = {row["tensor"] for row in evidence.tensors}
    columns = [
        Column("Adapter", "number"),
        Column("Tensor of the adapter", "name"),
        Column("Used as", "choice"),
        Column("Went into", "name"),
        Column("Done", "choice"),
    ]
    rows = [
        [
            use.adapter + 1,
            use.key,
            use.kind,
            _spelled(use.targets),
            "yes" if done.issuperset(use.targets) else "not yet",
        ]
        for use in found
    ]
    return Table(columns=columns, rows=rows)


def _read(task: Mapping[str, Any]) -> Iterator[tuple[int, str, str]]:
    """Adapter, tensor and kind of all that goes into a tensor of the result."""
    source = task["source"]
    if source["adapter"] is not None:
        yield source["adapter"], source["tensor"]["name"], "whole tensors"
    for update in task["updates"]:
        singles = update["parts"] if update["kind"] == "combined" else [update]
        for single in singles:
            adapter, kind = _adapter_of(single), KINDS.get(single["kind"], single["kind"])
            if adapter is not None:
                yield from ((adapter, key, kind) for key in _tensors(single))


def _adapter_of(update: Any) -> int | None:
    """The number of its adapter, which some updates leave to what they are made of."""
    if isinstance(update, Mapping):
        if "adapter" in update:
            return int(update["adapter"])
        update = update.values()
    elif not isinstance(update, list):
        return None
    return next((n for inner in update if (n := _adapter_of(inner)) is not None), None)


def _tensors(value: Any) -> Iterator[str]:
    """Names of the tensors of the adapter in an update, however deep: only they have offsets."""
    if isinstance(value, Mapping):
        if "offset" in value:
            yield value["name"]
        else:
            for inner in value.values():
                yield from _tensors(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _tensors(inner)


def _spelled(targets: tuple[str, ...]) -> str:
    more = f" and {len(targets) - 1} more" * (len(targets) > 1)
    return f"{targets[0]}{more}" if targets else "no tensor by itself"

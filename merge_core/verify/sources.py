"""What a merge was made from, as its plan tells or whoever asks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from merge_core.errors import InputError, refuse
from merge_core.stores.location import DEFAULT_ACCESS, Access, Location, Place, locate
from merge_core.stores.opening import pinned
from merge_core.verify.adapter_fields import REMEDY
from merge_core.verify.places import read_bytes
from merge_core.verify.strict_json import MalformedError, parse_object
from merge_core.verify.structure import RECORD

WeightedAdapter = tuple[Location, float]
_PLAN = f"{RECORD}/plan.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sources:
    """What a merge was made from, and what it was asked for."""

    base: Location
    adapters: tuple[WeightedAdapter, ...]
    keep_tied: bool = False
    method: str = "sum"
    """How the adapters were combined."""
    simulate_nf4: bool = False
    side_sources: Mapping[str, tuple[Location | None, str]] = field(default_factory=dict)
    """Files beside the weights that do not come from the base's file of their name: the folder
    (None: the base) and the name there."""


def parse_weighted(text: str, access: Access = DEFAULT_ACCESS) -> WeightedAdapter:
    """``path@0.5`` as place and weight; 1 without a number, or where the whole text is a path."""
    path, _, number = text.rpartition("@")
    try:
        weight = float(number) if path and not Path(text).exists() else math.nan
    except ValueError:
        weight = math.nan
    if math.isfinite(weight):
        return locate(path, access), weight
    return locate(text, access), 1.0


def check_method(method: str) -> None:
    """Refuse what numeric cannot check; with cat the factors lie side by side: that is the sum.

    Raises:
        InputError: the adapters were combined by another method.
    """
    if method not in ("sum", "cat"):
        raise refuse(f"cannot check adapters combined by {method}", "--combine", REMEDY)


def resolve_sources(
    out: Location, base: Place | None, adapters: Sequence[tuple[Place, float]] | None
) -> Sources:
    """Base and adapters to compare with: as given, else as the plan in ``out`` has them.

    Raises:
        InputError: something is neither given nor in the plan.
        StorageError: a model on the hub cannot be looked at.
    """
    planned: Sources | None = None
    try:
        planned = _planned_sources(out / _PLAN, out.access)
    except InputError:
        if base is None or adapters is None:
            raise
    if planned is not None:
        base = planned.base if base is None else base
        adapters = planned.adapters if adapters is None else adapters
    if base is None or adapters is None:
        raise AssertionError("the plan has both")
    return Sources(
        base=pinned(locate(base, out.access)),
        adapters=tuple((pinned(locate(place, out.access)), weight) for place, weight in adapters),
        keep_tied=planned is not None and planned.keep_tied,
        method=planned.method if planned is not None else "sum",
        simulate_nf4=planned is not None and planned.simulate_nf4,
        side_sources=planned.side_sources if planned is not None else {},
    )


def _planned_sources(file: Location, access: Access) -> Sources:
    try:
        plan = parse_object(read_bytes(file))
        return Sources(
            base=locate(plan["base"], access),
            adapters=tuple(
                (locate(a["path"], access), float(a["weight"])) for a in plan["adapters"]
            ),
            keep_tied=plan.get("keep_tied") is True,
            method=str(plan.get("combination", {}).get("method", "sum")),
            simulate_nf4=plan.get("simulate_nf4") is True,
            side_sources={
                name: (None if folder is None else locate(folder, access), str(there))
                for name, (folder, there) in plan.get("side_sources", {}).items()
            },
        )
    except (OSError, MalformedError, KeyError, TypeError, ValueError, AttributeError) as error:
        what = f"level numeric needs base and adapters, and the plan cannot tell them ({error!r})"
        raise refuse(what, str(file), "Give --base and --adapter") from error

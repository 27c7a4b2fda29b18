"""What a merge was made from, as its plan tells or whoever asks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from merge_core.errors import InputError, refuse
from merge_core.verify.adapter_fields import REMEDY
from merge_core.verify.strict_json import MalformedError, parse_object
from merge_core.verify.structure import RECORD

WeightedAdapter = tuple[Path, float]
_PLAN = f"{RECORD}/plan.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sources:
    """What a merge was made from, and what it was asked for."""

    base: Path
    adapters: tuple[WeightedAdapter, ...]
    keep_tied: bool = False
    method: str = "sum"
    """How the adapters were combined."""
    simulate_nf4: bool = False
    side_sources: Mapping[str, tuple[Path | None, str]] = field(default_factory=dict)
    """Files beside the weights that do not come from the base's file of their name: the folder
    (None: the base) and the name there."""


def parse_weighted(text: str) -> WeightedAdapter:
    """``path@0.5`` as path and weight; 1 without a number, or where the whole text is a path."""
    path, _, number = text.rpartition("@")
    try:
        weight = float(number) if path and not Path(text).exists() else math.nan
    except ValueError:
        weight = math.nan
    return (Path(path), weight) if math.isfinite(weight) else (Path(text), 1.0)


def check_method(method: str) -> None:
    """Refuse what numeric cannot check; with cat the factors lie side by side: that is the sum.

    Raises:
        InputError: the adapters were combined by another method.
    """
    if method not in ("sum", "cat"):
        raise refuse(f"cannot check adapters combined by {method}", "--combine", REMEDY)


def resolve_sources(
    out: Path, base: Path | None, adapters: Sequence[WeightedAdapter] | None
) -> Sources:
    """Base and adapters to compare with, absolute: as given, else as the plan in ``out`` has them.

    Raises:
        InputError: something is neither given nor in the plan.
    """
    planned: Sources | None = None
    try:
        planned = _planned_sources(out / _PLAN)
    except InputError:
        if base is None or adapters is None:
            raise
    if planned is not None:
        base = planned.base if base is None else base
        adapters = planned.adapters if adapters is None else adapters
    # Workers may run in another directory.
    return Sources(
        base=Path(base or "").absolute(),
        adapters=tuple((path.absolute(), weight) for path, weight in adapters or ()),
        keep_tied=planned is not None and planned.keep_tied,
        method=planned.method if planned is not None else "sum",
        simulate_nf4=planned is not None and planned.simulate_nf4,
        side_sources=planned.side_sources if planned is not None else {},
    )


def _planned_sources(plan_path: Path) -> Sources:
    try:
        plan = parse_object(plan_path.read_bytes())
        return Sources(
            base=Path(plan["base"]),
            adapters=tuple((Path(a["path"]), float(a["weight"])) for a in plan["adapters"]),
            keep_tied=plan.get("keep_tied") is True,
            method=str(plan.get("combination", {}).get("method", "sum")),
            simulate_nf4=plan.get("simulate_nf4") is True,
            side_sources={
                name: (None if folder is None else Path(folder), str(there))
                for name, (folder, there) in plan.get("side_sources", {}).items()
            },
        )
    except (OSError, MalformedError, KeyError, TypeError, ValueError, AttributeError) as error:
        what = f"level numeric needs base and adapters, and the plan cannot tell them ({error!r})"
        raise refuse(what, str(plan_path), "Give --base and --adapter") from error

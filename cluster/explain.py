"""What a plan does to the tensors of a base, in words and for programs."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from merge_core.errors import counted, some_of
from merge_core.memory import alone_bytes
from merge_core.plan import MergePlan, TensorTask
from merge_core.updates import LowRankUpdate, Update

KINDS = {
    "low_rank": "low-rank factors",
    "stacked": "low-rank factors of experts",
    "dora": "DoRA",
    "shift": "a bias on B",
    "rows": "trained tokens",
    "through_peft": "layers merged by PEFT",
}
"""By the kind of an update, see ``merge_core.updates``."""


def features_of(plan: MergePlan, adapter: int) -> dict[str, list[str]]:
    """The tensors that adapter number ``adapter`` touches, by what it does to them."""
    touched: dict[str, list[str]] = {}
    for task in plan.tasks:
        for kind in _kinds(task, adapter):
            touched.setdefault(kind, []).append(task.target.name)
    return touched


def _kinds(task: TensorTask, adapter: int) -> Iterator[str]:
    if task.source.adapter == adapter:
        yield "whole tensors"
    for update in task.parts:
        if update.adapter == adapter:
            yield _kind_of(update)


def _kind_of(update: Update) -> str:
    factors = update.factors if isinstance(update, LowRankUpdate) else ()
    if any(factor.blocks > 1 for factor in factors):
        return "block-diagonal factors (BD-LoRA)"
    if any(factor.columns is not None for factor in factors):
        return "low-rank factors of parameters (target_parameters)"
    return KINDS[update.kind]


def adapter_lines(plan: MergePlan) -> Iterator[str]:
    """Each adapter, and a line for each kind of thing that it does."""
    for number, adapter in enumerate(plan.adapters):
        yield f"adapter  {adapter.path}, weight {adapter.weight:g}: {adapter.peft_type}"
        for kind, names in features_of(plan, number).items():
            yield f"         {kind} on {counted(len(names), 'tensor')}: {_modules(names)}"
        if adapter.tuning is not None:
            yield f"         one layer at a time, in {peft_bytes(plan, number) / 1e6:,.0f} MB"


def peft_bytes(plan: MergePlan, adapter: int) -> int:
    """The most memory that PEFT needs for a layer of adapter number ``adapter``."""
    updates = (u for task in plan.tasks for u in task.parts if u.adapter == adapter)
    return max((alone_bytes(update, plan) for update in updates), default=0)


def _modules(names: Sequence[str]) -> str:
    """The last parts of their modules' paths, each once: most come in every layer."""
    paths = [name.split(".") for name in names]
    lasts = {path[-2] + ("" if path[-1] == "weight" else f".{path[-1]}") for path in paths}
    return ", ".join(sorted(lasts))


def adapter_documents(plan: MergePlan) -> list[dict[str, Any]]:
    """The same for programs."""
    return [
        {
            "path": str(adapter.path),
            "weight": adapter.weight,
            "peft_type": adapter.peft_type,
            "touches": features_of(plan, number),
            "peft_bytes": peft_bytes(plan, number),
        }
        for number, adapter in enumerate(plan.adapters)
    ]


def counts_of(plan: MergePlan) -> dict[str, int]:
    """How many tensors of the result come about in which way, and how many the base lacks."""
    counts = Counter(task.action for task in plan.tasks)
    ways = ("merged", "replaced", "decoded", "converted", "copied")
    return {**{way: counts[way] for way in ways}, "added": len(plan.added)}


def config_lines(plan: MergePlan) -> Iterator[str]:
    """The fields of config.json that the merge changes."""
    changes = [
        f"{name} {_value(plan.config[name])} -> {_value(value)}"
        if name in plan.config and value is not None
        else f"{name} {'removed' if value is None else _value(value)}"
        for name, value in plan.config_changes.items()
    ]
    if changes:
        yield f"config   {', '.join(changes)}"


def config_document(plan: MergePlan) -> dict[str, Any]:
    """The same for programs: each field as it was and as it becomes, None where it is not there."""
    return {
        name: {"from": plan.config.get(name), "to": value}
        for name, value in plan.config_changes.items()
    }


def _value(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


_SHOWN = 40
"""Characters of a value; lists by layer are longer, and the JSON document has them whole."""


def summary(plan: MergePlan) -> str:
    """``28 tensors merged, 23 copied``."""
    counts = counts_of(plan)
    merged, new = counted(counts.pop("merged"), "tensor"), counts.pop("added")
    others = [f"{number} {way}" for way, number in counts.items() if number]
    if new:
        others.append(f"{new} of them new: {some_of(plan.added)}")
    return ", ".join([f"{merged} merged", *others])

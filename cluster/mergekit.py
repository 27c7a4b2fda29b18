"""mergekit's notation for an adapter in a base: ``base+adapter`` with ``passthrough``.

    models:
      - model: Qwen/Qwen1.5-7B+/data/my-lora
    merge_method: passthrough
    dtype: bfloat16

Everything else that mergekit does with whole models is refused by name.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from cluster.yaml_text import Document, Place

_SIGNS = frozenset({"models", "slices", "modules", "merge_method"})
"""Keys of mergekit's that recipes do not have."""

_TAKEN = frozenset({"models", "merge_method", "dtype", "tokenizer_source"})

Fault = tuple[Place, str]


def is_mergekit(document: Document) -> bool:
    """Whether it looks like a configuration of mergekit's."""
    value = document.value
    return (
        isinstance(value, dict)
        and not {"base", "adapters"} & value.keys()
        and bool({"models", "slices", "modules"} & value.keys())
    )


def from_mergekit(document: Document) -> tuple[dict[str, Any], list[Fault]]:
    """The recipe that it stands for, and what of it raymeld does not do."""
    value, faults = document.value, list(_unknown(document))
    method = value.get("merge_method", "passthrough")
    if method != "passthrough":
        what = f"mergekit's merge_method {method!r} merges whole models, which raymeld does not"
        faults.append((document.place_of(("merge_method",)), what))
    recipe: dict[str, Any] = {"adapters": ["?"]}  # what takes its place, or a fault
    models = value.get("models")
    if not isinstance(models, list) or len(models) != 1:
        what = "mergekit's models: one is understood, written base+adapter"
        faults.append((document.place_of(("models",)), what))
    else:
        faults += _take_model(models[0], document, recipe)
    if "dtype" in value:
        recipe["dtype"] = value["dtype"]
    source = value.get("tokenizer_source", "base")
    if source == "base":
        recipe |= {"tokenizer": "base"} if "tokenizer_source" in value else {}
    else:
        what = f"mergekit's tokenizer_source {source!r}: base is understood"
        faults.append((document.place_of(("tokenizer_source",)), what))
    return recipe, faults


def _unknown(document: Document) -> Iterator[Fault]:
    for name in document.value.keys() - _TAKEN:
        what = f"mergekit's {name} has no counterpart in raymeld"
        yield document.place_of((name,), key=True), what


def _take_model(entry: Any, document: Document, recipe: dict[str, Any]) -> Iterator[Fault]:
    path = ("models", 0)
    if not isinstance(entry, dict) or not isinstance(entry.get("model"), str):
        yield document.place_of(path), "mergekit's model is written base+adapter here"
        return
    for name in sorted(entry.keys() - {"model"}):
        what = f"mergekit's {name} of a model has no counterpart in raymeld"
        yield document.place_of((*path, name), key=True), what
    base, plus, adapter = entry["model"].partition("+")
    place = document.place_of((*path, "model"))
    if not plus or not base or not adapter or "+" in adapter:
        yield place, f"{entry['model']!r} is not base+adapter: nothing would be merged into it"
    elif "@" in entry["model"]:
        yield place, f"{entry['model']!r}: revisions (@) are not understood in mergekit's notation"
    else:
        recipe |= {"base": base, "adapters": [{"path": adapter}]}

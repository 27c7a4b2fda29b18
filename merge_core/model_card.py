"""The model card of a merge: what the hub shows of it, and links it by."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from merge_core.stores.location import Location, locate

_CACHED = re.compile(r"/models--(?P<org>[^/]+?)--(?P<name>[^/]+)/snapshots/(?P<commit>\w+)")
"""A snapshot in huggingface_hub's cache: a path that says where its content comes from."""

_CARRIED = ("license", "license_name", "license_link", "language", "pipeline_tag")
"""What holds for a merge as it does for its base."""

_TAGS = ["merge", "peft", "raymeld"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """A model that a merge was made of, as others may know it: no path of this machine is told."""

    name: str
    """``org/name`` on the hub; the last part of a path otherwise."""
    revision: str | None
    """Commit on the hub; None: it is not known to come from there."""
    weight: float = 1.0
    """Of an adapter."""

    @classmethod
    def of(cls, place: str, weight: float = 1.0) -> Origin:
        """Of the base or adapter at ``place``."""
        location = locate(place)
        if location.scheme == "hf":
            revision = location.revision or "main"
            return cls(name=location.root, revision=revision, weight=weight)
        cached = _CACHED.search(location.path)
        if cached is not None:
            name = f"{cached['org']}/{cached['name']}"
            return cls(name=name, revision=cached["commit"], weight=weight)
        return cls(name=_plain(location), revision=None, weight=weight)

    @property
    def is_on_hub(self) -> bool:
        """Whether the name is one of the hub's."""
        return self.revision is not None

    def __str__(self) -> str:
        if not self.is_on_hub:
            return f"`{self.name}`"
        return f"[{self.name}](https://huggingface.co/{self.name}) at `{self.revision}`"


@dataclass(frozen=True, slots=True, kw_only=True)
class Lineage:
    """How a merge came about."""

    base: Origin
    adapters: tuple[Origin, ...]
    method: str
    """How the adapters were combined."""
    raymeld: str
    """Version."""
    level: str
    """At which it was verified."""


def model_card(title: str, lineage: Lineage, base_card: str | None) -> str:
    """README.md of the merge, metadata included.

    Args:
        title: how the model is called.
        base_card: README.md of the base, from which licence and language are taken.
    """
    from huggingface_hub import ModelCardData

    known = lineage.base.is_on_hub  # adapters alone would pass for what this is a version of
    origins = (lineage.base, *lineage.adapters)
    data = ModelCardData(
        base_model=[origin.name for origin in origins if origin.is_on_hub] if known else None,
        base_model_relation="merge" if known else None,
        library_name="transformers",
        tags=_TAGS,
        **_carried(base_card),
    )
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(_text(title, lineage)) + "\n"


def _carried(base_card: str | None) -> dict[str, Any]:
    from huggingface_hub import ModelCard

    if base_card is None or not base_card.startswith("---"):
        return {}
    try:
        data = ModelCard(base_card, ignore_metadata_errors=True).data
    except Exception:  # noqa: BLE001 - somebody else's YAML; the card does without
        return {}
    return {name: data.get(name) for name in _CARRIED if data.get(name) is not None}


def _text(title: str, lineage: Lineage) -> Sequence[str]:
    many = len(lineage.adapters) > 1
    return [
        f"# {title}",
        "",
        f"{lineage.base}, with {'these adapters' if many else 'this adapter'} merged into it:",
        "",
        *(f"- {adapter}, weight {adapter.weight:g}" for adapter in lineage.adapters),
        "",
        f"Made by raymeld {lineage.raymeld}"
        + (f", which combined them by `{lineage.method}`" if many else "")
        + f", and verified at level `{lineage.level}` before it was published. `raymeld.json` has"
        " the recipe, and the sha256 of every file.",
    ]


def _plain(location: Location) -> str:
    """A name that means nothing in Markdown."""
    return re.sub(r"[^\w .@+-]", "_", location.name) or "model"

"""The model card of a merge: what the hub shows of it, and links it by."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

CARD = "README.md"

_CACHED = re.compile(r"/models--(?P<org>[^/]+?)--(?P<name>[^/]+)/snapshots/(?P<commit>\w+)")
"""A snapshot in huggingface_hub's cache: a path that says where its content comes from."""

_HUB = re.compile(r"^hf://(?P<id>[^/@]+/[^/@]+)(@(?P<revision>[^/@]+))?(/.*)?$")

_CARRIED = ("license", "license_name", "license_link", "language", "pipeline_tag")
"""What holds for a merge as it does for its base."""

_TAGS = ["merge", "peft", "raymeld"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """A model that a merge was made of, as others may know it: no path of this machine is told."""

    name: str
    """``org/name`` on the hub; the last part of a path otherwise."""
    revision: str | None = None
    """Commit on the hub, if it is known."""
    weight: float = 1.0
    """Of an adapter."""

    @classmethod
    def of(cls, place: str, weight: float = 1.0) -> Origin:
        """Of the base or adapter at ``place``."""
        hub = _HUB.match(place)
        if hub is not None:
            return cls(name=hub["id"], revision=hub["revision"] or "main", weight=weight)
        cached = _CACHED.search(place)
        if cached is not None:
            name = f"{cached['org']}/{cached['name']}"
            return cls(name=name, revision=cached["commit"], weight=weight)
        return cls(name=_plain(place), weight=weight)

    @property
    def is_on_hub(self) -> bool:
        """Whether the name is one of the hub's."""
        return "/" in self.name

    @property
    def short(self) -> str:
        """Without the name of an organisation."""
        return self.name.rpartition("/")[2]

    def __str__(self) -> str:
        if not self.is_on_hub:
            return f"`{self.name}`"
        at = f" at `{self.revision}`" if self.revision else ""
        return f"[{self.name}](https://huggingface.co/{self.name}){at}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Lineage:
    """How a merge came about."""

    base: Origin
    adapters: tuple[Origin, ...]
    method: str
    """How the adapters were combined."""
    raymeld: str
    """Version."""
    level: str | None = None
    """At which it was verified; None: the card is written before that is known."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Those that changed its bytes, by the names that recipes have for them."""
    tensors: tuple[int, int] | None = None
    """How many changed, and how many there are."""


def model_card(title: str, lineage: Lineage, base_card: str | None) -> str:
    """README.md of the merge, metadata included; the same for the same lineage.

    Args:
        title: how the model is called.
        base_card: README.md of the base, from which licence and language are taken.
    """
    known = lineage.base.is_on_hub  # adapters alone would pass for what this is a version of
    origins = (lineage.base, *lineage.adapters)
    data: dict[str, Any] = {}
    if known:
        data["base_model"] = [origin.name for origin in origins if origin.is_on_hub]
        data["base_model_relation"] = "merge"
    data |= {"library_name": "transformers", "tags": _TAGS, **_carried(base_card)}
    return f"---\n{_yaml(data)}---\n\n" + "\n".join(_text(title, lineage)) + "\n"


def title_of(lineage: Lineage) -> str:
    """How a merge is called that nobody has named yet."""
    number = len(lineage.adapters)
    added = lineage.adapters[0].short if number == 1 else f"{number} adapters"
    return f"{lineage.base.short} with {added}"


def _carried(base_card: str | None) -> dict[str, Any]:
    import yaml

    found = re.match(r"\s*---\s*\n(.*?)\n---\s*(\n|$)", base_card or "", re.DOTALL)
    try:
        data = yaml.safe_load(found[1]) if found else None
    except (yaml.YAMLError, ValueError, RecursionError):  # somebody else's; the card does without
        return {}
    if not isinstance(data, dict):
        return {}
    return {name: data[name] for name in _CARRIED if _is_plain(data.get(name))}


def _is_plain(value: object) -> bool:
    """A text, or a list of texts: what the hub takes."""
    texts = value if isinstance(value, list) else [value]
    return bool(texts) and all(isinstance(text, str) and len(text) < 1000 for text in texts)


def _text(title: str, lineage: Lineage) -> Iterator[str]:
    many = len(lineage.adapters) > 1
    yield from (f"# {title}", "")
    yield f"{lineage.base}, with {'these adapters' if many else 'this adapter'} merged into it:"
    yield ""
    yield from (f"- {adapter}, weight {adapter.weight:g}" for adapter in lineage.adapters)
    yield ""
    made = f"Made by raymeld {lineage.raymeld}"
    if many:
        made += f", which combined them by `{lineage.method}`"
    if lineage.level is not None:
        yield (
            f"{made}, and verified at level `{lineage.level}` before it was published."
            " `raymeld.json` has the recipe, and the sha256 of every file."
        )
        return
    yield f"{made}. It was verified before its `config.json` was written."
    yield from _recipe(lineage)
    yield from _checks(lineage.tensors)


def _recipe(lineage: Lineage) -> Sequence[str]:
    adapters = [{"path": one.name, "weight": one.weight} for one in lineage.adapters]
    recipe = {"base": lineage.base.name, "adapters": adapters, **lineage.options}
    return ["", "## Recipe", "", "```yaml", _yaml(recipe).rstrip(), "```"]


def _checks(tensors: tuple[int, int] | None) -> Iterator[str]:
    yield from ("", "## Checks", "")
    if tensors is not None:
        yield f"- {tensors[0]} of {tensors[1]} tensors changed; all others are the base's bytes."
    yield "- `.raymeld/ledger.parquet`: by how much each changed, and the digest of each."
    yield "- `.raymeld/verified.json`: what was verified, at which level."
    yield "- `raymeld verify` does it again."


def _yaml(data: Mapping[str, Any]) -> str:
    import yaml

    text: str = yaml.safe_dump(dict(data), sort_keys=False, allow_unicode=True, width=10_000)
    return text


def _plain(place: str) -> str:
    """A name that means nothing in Markdown."""
    return re.sub(r"[^\w .@+-]", "_", PurePath(place).name) or "model"

"""The model card of a merge: what the hub shows of it, and links it by."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from merge_core.stores.location import Location, Place, locate

CARD = "README.md"

_CACHED = re.compile(r"/models--(?P<org>[^/]+?)--(?P<name>[^/]+)/snapshots/(?P<commit>\w+)")
"""A snapshot in huggingface_hub's cache: a path that says where its content comes from."""

_CARRIED = ("license", "license_name", "license_link", "language", "pipeline_tag")
"""What holds for a merge as it does for its base."""

_TAGS = ["merge", "peft", "raymeld"]

_RECORDS = """\
- `.raymeld/ledger.parquet`: by how much each changed, and the digest of each.
- `.raymeld/verified.json`: what was verified, at which level.
- `raymeld verify` does it again.
"""


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
    def of(cls, place: Place, weight: float = 1.0) -> Origin:
        """Of the base or adapter at ``place``."""
        location = locate(place)
        if location.scheme == "hf":
            revision = location.revision or "main"
            return cls(name=location.root, revision=revision, weight=weight)
        cached = _CACHED.search(location.path)
        if cached is not None:
            name = f"{cached['org']}/{cached['name']}"
            return cls(name=name, revision=cached["commit"], weight=weight)
        return cls(name=_plain(location), weight=weight)

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
    options: Mapping[str, Any]
    """Those that changed its bytes, by the names that recipes have for them."""
    tensors: tuple[int, int]
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


def names_base(card: str) -> bool:
    """Whether the hub will link it to the base's model."""
    return "base_model" in _metadata(card)


def for_hub(card: str, level: str) -> str:
    """A card as the hub is to show it, where ``raymeld.json`` takes the place of ``.raymeld``.

    Args:
        card: as the merge wrote it; what somebody has written since stays.
        level: at which the merge was verified.
    """
    records = (
        f"- It was verified at level `{level}` before it was published.\n"
        "- `raymeld.json`: what it was made of, and the sha256 of every file.\n"
    )
    return card.replace(_RECORDS, records)


def _metadata(card: str) -> dict[str, Any]:
    import yaml

    found = re.match(r"\s*---\s*\n(.*?)\n---\s*(\n|$)", card, re.DOTALL)
    try:
        data = yaml.safe_load(found[1]) if found else None
    except (yaml.YAMLError, ValueError, RecursionError):  # somebody else's; the card does without
        return {}
    return data if isinstance(data, dict) else {}


def _carried(base_card: str | None) -> dict[str, Any]:
    data = _metadata(base_card or "")
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
    yield f"{made}. It was verified before its `config.json` was written."
    yield from _recipe(lineage)
    yield from _checks(lineage.tensors)


def _recipe(lineage: Lineage) -> Sequence[str]:
    adapters = [{"path": one.name, "weight": one.weight} for one in lineage.adapters]
    recipe = {"base": lineage.base.name, "adapters": adapters, **lineage.options}
    return ["", "## Recipe", "", "```yaml", _yaml(recipe).rstrip(), "```"]


def _checks(tensors: tuple[int, int]) -> Iterator[str]:
    yield from ("", "## Checks", "")
    yield f"- {tensors[0]} of {tensors[1]} tensors changed; all others are the base's bytes."
    yield _RECORDS.rstrip()


def _yaml(data: Mapping[str, Any]) -> str:
    import yaml

    text: str = yaml.safe_dump(dict(data), sort_keys=False, allow_unicode=True, width=10_000)
    return text


def _plain(location: Location) -> str:
    """A name that means nothing in Markdown."""
    return re.sub(r"[^\w .@+-]", "_", location.name) or "model"

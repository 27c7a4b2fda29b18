"""The base that adapters name: ``base_model_name_or_path`` in their configs.

It is a path, relative to the current directory as PEFT takes it, or else an id on the hub.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from merge_core.adapter import Adapter
from merge_core.errors import InputError, Problem, refuse, shortened
from merge_core.stores.location import DEFAULT_ACCESS, Access, Location, locate

FIELD = "base_model_name_or_path"

_CACHED = re.compile(r"models--[^/]+?--(?P<name>[^/]+)/snapshots/")
"""A snapshot in huggingface_hub's cache."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

_PACKED = re.compile(r"(-unsloth)?-bnb-4bit$")
"""How unsloth calls the packed copy of a model that it trains on in its place."""


def base_named_by(adapters: Sequence[Adapter], access: Access = DEFAULT_ACCESS) -> Location:
    """The one base that all of ``adapters`` name.

    Raises:
        InputError: one names none, they name different ones, or it is a path that does not exist.
    """
    unnamed = [
        Problem(f"names no base ({FIELD})", str(adapter.path), "Give BASE before ADAPTER")
        for adapter in adapters
        if adapter.base_name is None
    ]
    if unnamed:
        raise InputError(unnamed)
    places = [_located(adapter, access) for adapter in adapters]
    number = len({_same(str(place)) for place in places})
    if number > 1:
        pairs = zip(adapters, places, strict=True)
        said = ", ".join(f"{adapter.path}: {place}" for adapter, place in pairs)
        what = f"the adapters were trained on {number} different bases ({said})"
        raise refuse(what, FIELD, "Give the BASE that they are to be merged into")
    base, name = places[0], str(adapters[0].base_name)
    if base.is_local and not os.path.isdir(base.local):
        what = f"its base is {_shown(name)}, which is not on this disk, and no name of the hub's"
        raise refuse(what, str(adapters[0].path), "Give BASE before ADAPTER")
    return base


def _located(adapter: Adapter, access: Access) -> Location:
    """Where its base lies: a path that exists, else on the hub in the version that it names."""
    name = str(adapter.base_name)
    if os.path.exists(name) or _HUB_ID.fullmatch(name) is None:
        return locate(name, access)
    version = f"@{adapter.base_revision}" if adapter.base_revision else ""
    return locate(f"hf://{name}{version}", access)


def notes_on_base(
    base: Location, config: Mapping[str, Any], adapters: Sequence[Adapter]
) -> Iterator[str]:
    """What is to be said if adapters were trained on another base than ``base``, by its name.

    Args:
        config: the base's config.json, which may say how the base is called elsewhere.
    """
    called = _called(base)
    known = {_plain(called), _plain(str(config.get("_name_or_path") or called))}
    for adapter in adapters:
        name = adapter.base_name
        if name is None or _same(name) == _same(called) or _plain(name) in known:
            continue
        yield (
            f"{adapter.path} was trained on {_shown(name)}, by its name another base than"
            f" {_last(called)}: if it is another, the result answers wrongly"
        )


def _shown(name: str) -> str:
    """Whole: names of models are longer than what ``shortened`` leaves."""
    return repr(name) if len(name) <= 200 else shortened(name)


def hub_name_of(
    base: Location, config: Mapping[str, Any], adapters: Sequence[Adapter]
) -> str | None:
    """The hub's name of ``base``, if its config or an adapter gives it one that fits; see
    ``notes_on_base``.
    """
    said = [config.get("_name_or_path"), *(adapter.base_name for adapter in adapters)]
    for name in said:
        if not isinstance(name, str) or _HUB_ID.fullmatch(name) is None or os.path.exists(name):
            continue
        if _plain(name) == _plain(_called(base)) and not _PACKED.search(name.casefold()):
            return name
    return None


def _called(base: Location) -> str:
    """Its name as adapters may have it: on the hub without commit and folder."""
    return base.root if base.scheme == "hf" else str(base)


def _same(name: str) -> str:
    """Equal for all names of one directory."""
    return os.path.realpath(name) if os.path.exists(name) else name


def _plain(name: str) -> str:
    """What is left of a name when case, places and packings are left out."""
    cached = _CACHED.search(name)
    last = cached["name"] if cached else _last(name)
    dotted = last.replace("___", ".")  # ModelScope's cache
    return _PACKED.sub("", dotted.casefold())


def _last(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2]

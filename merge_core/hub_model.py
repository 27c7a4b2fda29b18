"""What a model on the hub holds already, and whether a merge may be committed there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from merge_core.errors import refuse, some_of
from merge_core.model_card import CARD
from merge_core.output import LEDGER
from merge_core.side_files import CONFIG, INDEX
from merge_core.stores.location import Location
from merge_core.stores.opening import is_there

if TYPE_CHECKING:
    from merge_core.stores.hub_files import HubEntry
    from merge_core.stores.hub_push import HubPush

RECIPE = "raymeld.json"
"""In the model: what it was made of, and the sha256 of its files."""

_KEPT = "what the hub has of a merge is the model alone, without the records of how it was made"

_NEW = frozenset({".gitattributes", CARD})
"""All that the hub puts into a new model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Committed:
    """What the recipe of a model says of the merge that was committed there."""

    fingerprint: str
    sha256: Mapping[str, str]
    """Of its files."""


def refuse_recordless(model: Location) -> None:
    """Say where the records of a merge are, if ``model`` is one on the hub and has none.

    Raises:
        InputError: it is.
    """
    is_read = model.scheme == "hf" and model.upload is None
    if is_read and not is_there(model / LEDGER) and is_there(model / RECIPE):
        remedy = "Give the --state of that merge, or the folder that was pushed"
        raise refuse(_KEPT, str(model), remedy)


def merge_there(target: HubPush, *, begun: bool = False) -> str | None:
    """The fingerprint of the merge that a model holds; None: it is new.

    Args:
        begun: a merge has begun there before: what others add meanwhile may stay, unless it is
            what makes a model.

    Raises:
        InputError: it holds what raymeld did not make, or weights that somebody else has committed
            since: git keeps what is replaced, but nobody asked.
    """
    files = target.files()
    committed = _committed(target.read(RECIPE)) if RECIPE in files else None
    if committed is None:
        others = sorted(set(files) - _NEW)
        if begun:
            others = [name for name in others if name == CONFIG or is_weights(name)]
        if others:
            what = f"the model holds something else already: {some_of(others)}"
            raise refuse(what, str(target), "Choose another name, or a branch made for it")
        return None
    if changed := _changed(files, committed):
        what = f"{some_of(changed)} there and in the {RECIPE} beside differ"
        remedy = "Undo that commit on the hub, or choose another name, or a branch made for it"
        raise refuse(f"somebody else has committed weights since: {what}", str(target), remedy)
    return committed.fingerprint


def check_usable(
    target: HubPush,
    fingerprint: str,
    *,
    overwrite: bool,
    begun: bool = False,
    replaces: str | None = None,
) -> str | None:
    """Make sure that a merge may go to a model; returns the fingerprint of the merge that is there.

    Args:
        fingerprint: of the merge that is to go there.
        overwrite: it may replace another merge of raymeld's.
        begun: see ``merge_there``.
        replaces: the fingerprint of another one that it was let replace when it began.

    Raises:
        InputError: see ``merge_there``; or it holds another merge.
    """
    there = merge_there(target, begun=begun)
    if there is None or overwrite or there in (fingerprint, replaces):
        return there
    what = f"the model holds a merge of plan {there[:12]}; this one is {fingerprint[:12]}"
    remedy = "Choose another name or branch, or give --overwrite to replace it: git keeps the old"
    raise refuse(what, str(target), remedy)


def is_weights(name: str) -> bool:
    """Whether a loader could take a file of that name for a part of the model."""
    return "/" not in name and name.endswith((".safetensors", INDEX))


def _committed(recipe: bytes) -> _Committed | None:
    """None if it is somebody else's file of that name."""
    try:
        found = json.loads(recipe)
        fingerprint, sha256 = found["fingerprint"], found["sha256"]
    except (ValueError, KeyError, TypeError):
        return None
    if not isinstance(fingerprint, str) or not isinstance(sha256, dict):
        return None
    return _Committed(fingerprint=fingerprint, sha256=sha256)


def _changed(files: Mapping[str, HubEntry], committed: _Committed) -> list[str]:
    """Weights that are not those of the recipe, or missing, or more. The index is in git, which
    tells no sha256.
    """
    wanted = {name: one for name, one in committed.sha256.items() if _is_tensors(name)}
    there = {name for name in files if _is_tensors(name)}
    return sorted(
        name
        for name in there | wanted.keys()
        if name not in files or not files[name].holds(str(wanted.get(name)))
    )


def _is_tensors(name: str) -> bool:
    return is_weights(name) and name != INDEX

"""What the model card of a plan says: where base and adapters come from, and what was done."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import fields, replace
from typing import Any

from merge_core import __version__
from merge_core.adapter import Adapter
from merge_core.checkpoint import Checkpoint
from merge_core.model_card import CARD, Lineage, Origin, model_card, title_of
from merge_core.named_base import hub_name_of
from merge_core.plan import Shard
from merge_core.stores.location import Access, locate
from merge_core.stores.opening import open_store

_MOST = 1 << 20
"""Bytes of a base's card that are looked at; its metadata come first."""

_PRIVATE = frozenset({"base", "adapters", *(field.name for field in fields(Access))})
"""What of a recipe is told by other means, or is nobody's business."""


def card_of(
    checkpoint: Checkpoint,
    adapters: Sequence[Adapter],
    recipe: Mapping[str, Any],
    shards: Sequence[Shard],
) -> str:
    """README.md of the result. No time and no path of this machine stand in it.

    Raises:
        StorageError: the base's own card cannot be read.
    """
    base = Origin.of(str(checkpoint.path))
    named = hub_name_of(checkpoint.path, checkpoint.config, adapters)
    if named is not None and not base.is_on_hub:
        base = replace(base, name=named)
    tasks = [task for shard in shards for task in shard.tasks]
    lineage = Lineage(
        base=base,
        adapters=tuple(Origin.of(str(one.path), one.weight) for one in adapters),
        method=str(recipe["combine"]),
        raymeld=__version__,
        options=_public(recipe),
        tensors=(sum(task.action != "copied" for task in tasks), len(tasks)),
    )
    return model_card(title_of(lineage), lineage, _card_of_base(checkpoint))


def _public(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The options alone, of places their names."""
    options = {name: recipe[name] for name in recipe.keys() - _PRIVATE}
    for name in options.keys() & {"tokenizer", "device_map"}:
        options[name] = locate(options[name]).name
    return {name: options[name] for name in recipe if name in options}


def _card_of_base(checkpoint: Checkpoint) -> str | None:
    """README.md of the base, as much of it as matters."""
    for side in checkpoint.side_files:
        if side.file.name == CARD:
            with closing(open_store(side.folder).open(side.file)) as reader:
                data = bytes(reader.read(0, min(_MOST, side.file.size)))
            return data.decode(errors="replace")
    return None

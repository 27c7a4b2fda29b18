"""What a merge's one commit to the hub has beside the weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from merge_core.errors import refuse, some_of
from merge_core.hub_model import RECIPE, is_weights
from merge_core.ledger import unfold_ledger
from merge_core.model_card import CARD, Origin, for_hub
from merge_core.output import LEDGER
from merge_core.side_files import CONFIG, INDEX
from merge_core.stores.hub_objects import Sent
from merge_core.stores.hub_push import HubPush
from merge_core.stores.location import Location
from merge_core.stores.opening import read_file


def small_files(out: Location, plan: Mapping[str, Any], config: str = CONFIG) -> dict[str, bytes]:
    """Config, index and side files, which must be as the merge wrote them, but for the card.

    Args:
        plan: plan.json.
        config: where the config lies.

    Raises:
        InputError: one of them changed.
    """
    _, about = unfold_ledger(read_file(out / LEDGER))
    digests = about["files"]
    names = [*([INDEX] if len(plan["shards"]) > 1 else []), *plan["side_files"]]
    contents = {CONFIG: read_file(out / config)}
    contents |= {name: read_file(out / name) for name in names}
    fixed = {name: data for name, data in contents.items() if name != CARD}
    changed = [n for n, data in fixed.items() if hashlib.sha256(data).hexdigest() != digests[n]]
    if changed:
        what, remedy = f"{some_of(changed)} changed since the merge", "Merge again"
        raise refuse(what, str(out), f"{remedy}, or upload the folder as it is with `hf upload`")
    return contents


def commit_merge(
    target: HubPush,
    plan: Mapping[str, Any],
    sent: Sequence[Sent],
    small: Mapping[str, bytes],
    level: str,
) -> str:
    """Commit what the model has not, and remove other weights; returns the address of the commit
    that has it all.

    Args:
        plan: plan.json.
        small: see ``small_files``.
        level: at which it was verified.
    """
    contents = {**small, **_descriptions(plan, sent, small, level)}
    before = target.files()
    wanted: dict[str, str | bytes] = {**{one.name: one.sha256 for one in sent}, **contents}
    leftovers = [name for name in before if is_weights(name) and name not in wanted]
    if not leftovers and all(n in before and before[n].holds(w) for n, w in wanted.items()):
        return target.url
    return target.commit(sent, contents, f"Merge by raymeld {plan['raymeld']}", leftovers)


def _descriptions(
    plan: Mapping[str, Any], sent: Sequence[Sent], small: Mapping[str, bytes], level: str
) -> dict[str, bytes]:
    """Model card and recipe."""
    base = Origin.of(plan["base"])
    adapters = [Origin.of(each["path"], each["weight"]) for each in plan["adapters"]]
    card = for_hub(small[CARD].decode(errors="replace"), level)
    recipe = {
        "raymeld": plan["raymeld"],
        "fingerprint": plan["fingerprint"],
        "base": {"name": base.name, "revision": base.revision},
        "adapters": [
            {"name": each.name, "revision": each.revision, "weight": each.weight}
            for each in adapters
        ],
        "combination": plan["combination"],
        "keep_tied": plan["keep_tied"],
        "simulate_nf4": plan["simulate_nf4"],
        "verified": level,
        "sha256": {one.name: one.sha256 for one in sent}
        | {n: hashlib.sha256(d).hexdigest() for n, d in small.items() if n not in (CARD, RECIPE)},
    }
    return {CARD: card.encode(), RECIPE: json.dumps(recipe, indent=1).encode() + b"\n"}

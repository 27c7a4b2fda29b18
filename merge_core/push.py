"""A finished merge onto the Hugging Face hub, in one commit."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

from merge_core.errors import refuse, some_of
from merge_core.ledger import unfold_ledger
from merge_core.model_card import CARD, Origin, for_hub, names_base
from merge_core.output import LEDGER, VERIFIED, read_plan
from merge_core.side_files import CONFIG, INDEX
from merge_core.stores.hub_files import HubEntry
from merge_core.stores.hub_push import HubPush, Sent
from merge_core.stores.hub_retries import PATIENT, Retries
from merge_core.stores.location import Location, Place, locate_out
from merge_core.stores.opening import open_store, read_file

RECIPE = "raymeld.json"
"""In the model: what it was made of, and the sha256 of its files."""

_NEW = frozenset({".gitattributes", CARD})
"""All that the hub puts into a new model."""


def push(
    out: Place,
    repo: str,
    *,
    private: bool = True,
    revision: str | None = None,
    say: Callable[[str], None],
    retries: Retries = PATIENT,
) -> str:
    """Put the finished merge in ``out`` onto the hub; returns the address of its commit.

    Calling it again sends nothing that the hub holds, and commits nothing that it has.

    Args:
        repo: ``org/name``; is made if there is no such model.
        private: nobody else may see it.
        revision: a branch that exists; None: the main one.
        say: told what is done.

    Raises:
        InputError: ``out`` is no finished merge on a disk, or the model there is none of raymeld's.
        StorageError: the hub cannot be reached, or refuses, or somebody else has committed.
        VerificationError: what the hub has afterwards is not what was sent.
    """
    folder = locate_out(out)
    plan = _finished(folder)
    small, shards = _small_files(folder, plan), [shard["name"] for shard in plan["shards"]]
    target = HubPush.begin(repo, revision, private=private, retries=retries)
    before = target.files()
    _check_usable(repo, before)
    sent = [_send(target, folder, name, say) for name in shards]
    contents = small | _descriptions(folder, plan, sent, small)
    if not names_base(contents[CARD].decode(errors="replace")):
        say("the model card names no base on the hub: BASE was none")
    wanted: dict[str, str | bytes] = {**{one.name: one.sha256 for one in sent}, **contents}
    leftovers = [name for name in before if _is_weights(name) and name not in wanted]
    if not leftovers and all(n in before and before[n].holds(w) for n, w in wanted.items()):
        say(f"{repo} has all of it already")
        return target.url
    return target.commit(sent, contents, f"Merge by raymeld {plan['raymeld']}", leftovers)


def _finished(out: Location) -> dict[str, Any]:
    """plan.json of the merge.

    Raises:
        InputError: it is none, or not finished.
    """
    if not out.is_local:
        raise refuse("lies in a store", str(out), "Copy it to a disk, and push it from there")
    plan = read_plan(out)
    if plan is None:
        raise refuse("is no merge of raymeld's", str(out), "Give the OUT of one")
    sizes = {shard["name"]: shard["size"] for shard in plan["shards"]}
    there = {listed.name: listed.size for listed in open_store(out).list()}
    absent = [name for name, size in sizes.items() if there.get(name) != size]
    if absent or VERIFIED not in there or CONFIG not in there:
        what = "is an unfinished merge" + (f": {some_of(absent)} missing" if absent else "")
        remedy = "Give the same merge command again, which goes on where it stopped"
        raise refuse(what, str(out), remedy)
    return plan


def _small_files(out: Location, plan: Mapping[str, Any]) -> dict[str, bytes]:
    """Config, index and side files, which must be as the merge wrote them, but for the card."""
    _, about = unfold_ledger(read_file(out / LEDGER))
    digests = about["files"]
    names = [CONFIG, *([INDEX] if len(plan["shards"]) > 1 else []), *plan["side_files"]]
    contents = {name: read_file(out / name) for name in names}
    fixed = {name: data for name, data in contents.items() if name != CARD}
    changed = [n for n, data in fixed.items() if hashlib.sha256(data).hexdigest() != digests[n]]
    if changed:
        what, remedy = f"{some_of(changed)} changed since the merge", "Merge again"
        raise refuse(what, str(out), f"{remedy}, or upload the folder as it is with `hf upload`")
    return contents


def _check_usable(repo: str, files: Mapping[str, HubEntry]) -> None:
    """Refuse a model that is none of raymeld's: git keeps what is replaced, but nobody asked."""
    if RECIPE not in files and (others := sorted(set(files) - _NEW)):
        what = f"the model holds something else already: {some_of(others)}"
        raise refuse(what, f"hf://{repo}", "Choose another name, or a branch made for it")


def _send(target: HubPush, out: Location, name: str, say: Callable[[str], None]) -> Sent:
    sent = target.send(out.local / name, name)
    say(f"the hub holds {name} ({sent.size / 1e9:.2f} GB)")
    return sent


def _descriptions(
    out: Location, plan: Mapping[str, Any], sent: list[Sent], small: Mapping[str, bytes]
) -> dict[str, bytes]:
    """Model card and recipe."""
    base = Origin.of(plan["base"])
    adapters = [Origin.of(each["path"], each["weight"]) for each in plan["adapters"]]
    level = json.loads(read_file(out / VERIFIED))["level"]
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


def _is_weights(name: str) -> bool:
    return "/" not in name and name.endswith((".safetensors", INDEX))

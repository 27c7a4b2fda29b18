"""A finished merge onto the Hugging Face hub, in one commit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from merge_core.errors import refuse, some_of
from merge_core.hub_commit import commit_merge, small_files
from merge_core.hub_model import check_usable
from merge_core.ledger import unfold_ledger
from merge_core.model_card import CARD, names_base
from merge_core.output import LEDGER, VERIFIED, read_plan, verified_level
from merge_core.side_files import CONFIG
from merge_core.stores.hub_objects import Sent
from merge_core.stores.hub_push import HubPush
from merge_core.stores.location import Location, Place, locate_out
from merge_core.stores.opening import open_store, read_file
from merge_core.stores.retries import PATIENT, Retries
from merge_core.verify import MalformedError, ReadBack, read_back


def push(
    out: Place,
    model: Location,
    *,
    private: bool = True,
    overwrite: bool = False,
    say: Callable[[str], None],
    retries: Retries = PATIENT,
) -> str:
    """Put the finished merge in ``out`` onto the hub; returns the address of its commit.

    Calling it again sends nothing that the hub holds, and commits nothing that it has.

    Args:
        model: on the hub, see ``locate_model``; is made if there is none. A branch must exist.
        private: nobody else may see it.
        overwrite: replace another merge that the model holds.
        say: told what is done.

    Raises:
        InputError: ``out`` is no finished merge on a disk, or changed since it was verified; or the
            model holds another merge, or what is none of raymeld's; or there is no such branch, or
            this account may not write there.
        StorageError: the hub cannot be reached, or refuses, or somebody else has committed.
        VerificationError: what the hub has afterwards is not what was sent.
    """
    folder = locate_out(out)
    plan = _finished(folder)
    small, shards = small_files(folder, plan), [shard["name"] for shard in plan["shards"]]
    target = HubPush.begin(model.root, model.revision, private=private, retries=retries)
    check_usable(target, plan["fingerprint"], overwrite=overwrite)
    target.check_writable()
    rows, _ = unfold_ledger(read_file(folder / LEDGER))
    sent = [_send(target, folder, name, rows, say) for name in shards]
    if not names_base(small[CARD].decode(errors="replace")):
        say("the model card names no base on the hub: BASE was none")
    url = commit_merge(target, plan, sent, small, verified_level(folder))
    if url == target.url:
        say(f"{model.root} has all of it already")
    return url


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


def _send(
    target: HubPush,
    out: Location,
    name: str,
    rows: Sequence[Mapping[str, Any]],
    say: Callable[[str], None],
) -> Sent:
    """Send what the ledger speaks of, or nothing: the model card says that it was verified.

    Args:
        rows: of the ledger.
    """
    found = _read_again(out / name)
    digests = {row["tensor"]: row["digest"] for row in rows if row["file"] == name}
    if changed := found.changed(digests):
        what = f"{name} changed since the merge: {some_of(changed)}"
        raise refuse(what, str(out), "Merge again")
    sent = Sent(name=name, size=found.size, sha256=found.sha256)
    if target.missing([sent]):
        sent = target.send(out.local / name, name)
    if sent.sha256 != found.sha256:
        raise refuse(f"{name} changed while it was sent", str(out), "Push it again")
    say(f"the hub holds {name} ({sent.size / 1e9:.2f} GB)")
    return sent


def _read_again(file: Location) -> ReadBack:
    try:
        return read_back(file)
    except MalformedError as error:
        what = f"{file.name} changed since the merge: {error}"
        raise refuse(what, str(file.parent), "Merge again") from error

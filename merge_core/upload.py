"""A merge that goes to the hub: whether it may, what it leaves in its state, and its one commit.

huggingface_hub, which takes long to import, is so only where there is such a merge.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from merge_core.errors import AbsentError, Problem, StorageError, gathered, some_of
from merge_core.output import STAGED_CONFIG, read_plan, verified_level
from merge_core.plan import MergePlan
from merge_core.stores.location import Location, Upload, onto_hub
from merge_core.stores.opening import open_hub_out, open_store, read_file
from merge_core.stores.scratch import scratch_of
from merge_core.stores.store import HUB_RECORD

if TYPE_CHECKING:
    from merge_core.stores.hub_out import HubOut

MEMORY_REMEDY = "Give --scratch a directory on a disk, unless the node has so much to spare"

LEVELS = ("structure", "digest", "load")
"""At which what is sent can be verified: by its headers, and by each byte as it was read back."""


def kept_in(out: Location) -> Location:
    """Where a merge keeps its records: in OUT, or in the state of one that goes to the hub."""
    return out if out.upload is None else out.upload.state


def lacks_state(out: Location) -> list[Problem]:
    """That a merge onto the hub was given none."""
    if out.scheme != "hf" or out.upload is not None:
        return []
    what = "a merge onto the hub keeps its records elsewhere until it is done"
    return [Problem(what, str(out), "Give --state: a folder of its own, or s3://bucket/key")]


def check_upload(out: Location, plan: MergePlan | None) -> list[Problem]:
    """What stands against ``plan`` going to the hub, or against any; nothing is made there. None of
    other places.

    Raises:
        StorageError: the hub cannot be asked.
    """
    if out.upload is None:
        return lacks_state(out)
    problems, limit = list(_of_state(out.upload.state, out)), out.upload.scratch_limit
    finished = not problems and open_hub_out(out).committed
    largest = max((shard.size for shard in plan.shards), default=0) if plan else 0
    if limit is not None and largest > limit:
        what = f"the largest file of the result has {largest} bytes, more than may lie there"
        remedy = "Allow as much, or give a smaller --shard-size"
        problems.append(Problem(what, f"--scratch-limit {limit}", remedy))
    with gathered(problems):
        if not finished:  # or that may be all that is asked for; else see check_model
            _merge_on(out)
    return problems


def _merge_on(out: Location) -> str | None:
    """The fingerprint of the merge that the model holds; None: it is new, or yet to be made.

    Raises:
        InputError: it is none that a merge may go to.
        StorageError: the hub cannot be asked.
    """
    from merge_core.hub_model import merge_there
    from merge_core.stores.hub_push import HubPush

    assert out.upload is not None
    target = HubPush.look(out.root, out.revision, private=out.upload.private)
    if target is None:
        return None
    return merge_there(target, begun=bool(open_hub_out(out).record))


def check_account(out: Location) -> None:
    """Make sure that this account may write to a model on the hub, or make it, as far as the hub
    tells that without a write.

    Raises:
        InputError: it may not.
        StorageError: the hub cannot be asked.
    """
    from merge_core.stores.hub_push import HubPush, check_owner

    target = HubPush.look(out.root, out.revision, private=False)
    if target is None:
        check_owner(out.root)
    else:
        target.check_writable()


def check_model(out: Location, plan: MergePlan, *, overwrite: bool) -> None:
    """Make sure that ``plan``, which must be sealed, may go to a model on the hub; all other places
    are left to ``output.check_usable``.

    Raises:
        InputError: everybody can see it, or it holds another merge, or what raymeld did not make;
            or this account may not write there.
        StorageError: the hub cannot be asked.
    """
    if out.upload is None:
        return
    from merge_core.hub_model import check_usable
    from merge_core.stores.hub_push import HubPush, check_owner

    record = {} if overwrite else open_hub_out(out).record  # which begins anew
    target = HubPush.look(out.root, out.revision, private=out.upload.private)
    if target is None:
        check_owner(out.root)
        return
    check_usable(
        target,
        plan.fingerprint,
        overwrite=overwrite,
        begun=bool(record),
        replaces=record.get("replaces"),
    )
    target.check_writable()  # before hours of work, not after


def notes_on_model(out: Location) -> list[Problem]:
    """What stands against every merge but one onto a model on the hub, and is not in its state.

    Raises:
        StorageError: the hub cannot be asked.
    """
    if out.upload is None or open_hub_out(out).record:
        return []
    there = _merge_on(out)
    if there is None:
        return []
    what = f"holds a merge, of plan {there[:12]}"
    remedy = "The same merge changes nothing there; any other is refused without --overwrite"
    return [Problem(what, str(out), remedy)]


def _of_state(state: Location, out: Location) -> Iterator[Problem]:
    """What stands against ``state`` being that of ``out``: it may be another merge's."""
    there, remedy = destination_of(state), "Give --state a folder of its own"
    if there is None:
        names = (listed.name for listed in open_store(state).list())
        if any("/" not in name and name.endswith(".safetensors") for name in names):
            yield Problem("holds weights, of a merge that went there itself", str(state), remedy)
    elif (there.root, there.revision) != (out.root, open_hub_out(out).target.revision):
        yield Problem(f"is the state of a merge onto {there}", str(state), remedy)


def scratch_in_memory(out: Location) -> str:
    """What to say of the scratch of this machine where it is memory; empty where it is none."""
    return "" if out.upload is None else scratch_of(out.upload).in_memory


def check_scratch(out: Location) -> str:
    """Make sure that the scratch of this machine, which is about to merge, can be written to;
    returns what ``scratch_in_memory`` does.

    Raises:
        InputError: it cannot.
    """
    if out.upload is not None:
        scratch_of(out.upload).try_out()
    return scratch_in_memory(out)


def notes_on_scratch(out: Location, plan: MergePlan) -> list[Problem]:
    """What a merge to the hub needs of each node; nothing of others."""
    if out.upload is None:
        return []
    largest = max((plan.shards[index].size for index in plan.stage), default=0)
    what = (
        f"holds, for each worker of a node, a file of up to {largest / 1e9:.2f} GB until it is sent"
    )
    remedy = "The disk needs that room; --scratch-limit bounds what all of them hold"
    where = f"--scratch {out.upload.scratch or '(temporary files)'}"
    notes = [Problem(what, where, remedy)]
    if memory := scratch_in_memory(out):
        notes.append(Problem(f"here, {memory}", where, MEMORY_REMEDY))
    return notes


def check_level(out: Location, level: str) -> list[Problem]:
    """What stands against verifying at ``level`` what goes to ``out``."""
    if out.scheme != "hf" or level in LEVELS:
        return []
    what = "reads the whole result before it is published, and the hub shows nothing before that"
    remedy = f"Take {', '.join(LEVELS)}; or merge to a disk, verify it, and push it"
    return [Problem(what, f"--verify {level}", remedy)]


def make_ready(out: Location, plan: MergePlan, *, overwrite: bool) -> None:
    """Of a model on the hub: make it if there is none, and keep the commit that the merge follows.

    Raises:
        InputError: see ``check_model``.
        StorageError: the hub cannot be asked.
    """
    if out.upload is None:
        return
    from merge_core.hub_model import check_usable
    from merge_core.stores.hub_push import HubPush

    store, upload = open_hub_out(out), out.upload
    target = HubPush.begin(out.root, out.revision, private=upload.private)
    before = store.record
    there = check_usable(
        target,
        plan.fingerprint,
        overwrite=overwrite,
        begun=bool(before),
        replaces=before.get("replaces"),
    )
    record = {"model": out.root, "branch": store.target.revision, "private": upload.private}
    unmade = {"replaces": there, "parent": target.parent, "commit": None, "url": None}
    _keep(store, record | unmade)


def commit_out(out: Location, plan: MergePlan) -> None:
    """Commit the merge, whose weights the hub holds, and keep where.

    Raises:
        StorageError: the hub has lost something, or somebody else has committed.
        VerificationError: what the hub has afterwards is not what was sent.
    """
    from merge_core.hub_commit import commit_merge, small_files
    from merge_core.stores.hub_objects import Sent
    from merge_core.stores.hub_push import HubPush

    store, written = open_hub_out(out), read_plan(out)
    if written is None or not store.record:
        raise StorageError("its plan, or what it says of the hub, is gone", str(out))
    found = {shard.name: store.sent(shard.name) for shard in plan.shards}
    sent = [Sent(name=n, size=one.size, sha256=one.sha256) for n, one in found.items()]
    target = HubPush(store.target, store.record["parent"])
    if lost := [one.name for one in target.missing(sent)]:
        what, remedy = f"the hub does not hold {some_of(lost)} any more", "The same command again"
        raise StorageError(what, str(out), f"{remedy} merges and sends what is missing")
    small = small_files(out, written, STAGED_CONFIG)
    url = commit_merge(target, written, sent, small, verified_level(out))
    commit = url.rpartition("/")[2]
    _keep(store, {**store.record, "commit": commit, "url": url})


def published_at(out: Location) -> str | None:
    """The address of the commit that has the merge; None of other places, or before it."""
    if out.upload is None:
        return None
    found: str | None = open_hub_out(out).record.get("url")
    return found


def destination_of(state: Location) -> Location | None:
    """The model on the hub whose state ``state`` is; None of any other folder.

    Raises:
        StorageError: it may not be looked at.
    """
    try:
        record = json.loads(read_file(state / HUB_RECORD))
        model = Location(
            scheme="hf", root=record["model"], revision=record["branch"], access=state.access
        )
        return onto_hub(model, Upload(state=state, private=record["private"]))
    except (AbsentError, ValueError, KeyError, TypeError):
        return None


def _keep(store: HubOut, record: Mapping[str, Any]) -> None:
    store.put(HUB_RECORD, json.dumps(record, indent=1).encode())

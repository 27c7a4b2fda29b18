"""What is said of OUT before a merge begins, to who plans one: nothing is written."""

from __future__ import annotations

import dataclasses
import json

from merge_core.errors import InputError, Problem
from merge_core.lease import live_holder
from merge_core.output import (
    accepted_shards,
    check_location,
    check_space,
    is_new,
    not_ours,
    read_plan,
    written_bytes,
)
from merge_core.plan import MergePlan
from merge_core.side_files import CONFIG
from merge_core.stores.location import Location
from merge_core.stores.opening import is_there


def check_destination(out: Location, plan: MergePlan) -> None:
    """What ``merge`` would say of OUT before it begins, as far as headers tell: what it says of an
    earlier merge there depends on the adapters' content, see ``notes_on``.

    Raises:
        InputError: OUT lies in what is read, or holds what is not ours.
        StorageError: the disk is too small, or OUT may not be looked at.
    """
    problems = check_location(out, plan.base, tuple(a.path for a in plan.adapters))
    if problems:
        raise InputError(problems)
    check_ownership(out)
    check_space(out, plan, freed=written_bytes(out))


def check_ownership(out: Location) -> None:
    """Make sure that a merge finds nothing in OUT, or an earlier merge.

    Raises:
        InputError: it holds something else.
        StorageError: it may not be looked at.
    """
    if not is_new(out) and read_plan(out) is None:
        raise InputError([not_ours(out)])


def shards_there(out: Location, plan: MergePlan) -> frozenset[int]:
    """The shards that OUT holds of the same merge, as far as headers tell; ``merge`` proves them.

    Raises:
        StorageError: it may not be looked at.
    """
    earlier = read_plan(out)
    mine = json.loads(json.dumps([dataclasses.asdict(shard) for shard in plan.shards]))
    if earlier is None or earlier["shards"] != mine:
        return frozenset()
    everything = frozenset(range(len(plan.shards)))
    return everything if is_there(out / CONFIG) else everything & accepted_shards(out)


def notes_on(out: Location) -> list[Problem]:
    """What lies in OUT, and stands against every merge but one.

    Raises:
        StorageError: it may not be looked at.
    """
    notes, earlier = [], read_plan(out)
    if earlier is not None:
        plan, finished = f"plan {earlier['fingerprint'][:12]}", is_there(out / CONFIG)
        what = f"holds {'a finished' if finished else 'an unfinished'} merge, of {plan}"
        same = "finds that it is done" if finished else "goes on with it"
        remedy = f"The same merge {same}; any other is refused without --overwrite"
        notes.append(Problem(what, str(out), remedy))
    holder = live_holder(out)
    if holder is not None:
        remedy = "Wait for it (raymeld status shows it) or stop it: no other may begin before"
        notes.append(Problem(f"{holder} is merging into it", str(out), remedy))
    return notes

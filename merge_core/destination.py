"""What is said of OUT before a merge begins, to who plans one: nothing is written."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from merge_core.errors import InputError, Problem, StorageError
from merge_core.lease import live_holder
from merge_core.output import (
    accepted_shards,
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
from merge_core.upload import check_upload, destination_of, notes_on_model


def check_destination(out: Location, plan: MergePlan) -> None:
    """What ``merge`` would say of OUT before it begins, as far as headers tell: what it says of an
    earlier merge there depends on the adapters' content, see ``notes_on``.

    Raises:
        InputError: OUT lies in what is read, or holds what is not ours.
        StorageError: the disk is too small, or OUT may not be looked at, or the hub not be asked.
    """
    if problems := check_location(out, plan):
        raise InputError(problems)
    check_ownership(out)
    check_space(out, plan, freed=written_bytes(out))


def check_location(out: Location, plan: MergePlan) -> list[Problem]:
    """Problems of where OUT lies: it may share no folder with what is read, and must be one that
    can be written to.

    Raises:
        StorageError: the hub cannot be asked.
    """
    inputs = [("BASE", plan.base), *(("ADAPTER", adapter.path) for adapter in plan.adapters)]
    problems = check_access(out)
    unsigned = bool(problems)  # then nobody there would answer
    if not unsigned:
        problems += check_upload(out, plan)
    try:
        for mine, place in _written(out):
            for name, path in inputs:
                if _share(place, path):
                    what = f"{mine} and {name} ({path}) lie in one another"
                    remedy = f"Choose an --{mine.lower()} outside of what is read"
                    problems.append(Problem(what, str(place), remedy))
            if place.is_local:
                problems += _below_files(mine, place)
        if not unsigned and out.upload is None and (model := destination_of(out)) is not None:
            remedy = f"Give --out {model} --state {out}, or another --out"
            problems.append(Problem(f"is the state of a merge onto {model}", str(out), remedy))
    except StorageError as error:  # which is an OSError
        return [*problems, Problem(error.what, str(out), error.remedy)]
    except (OSError, ValueError, RuntimeError) as error:  # too long, a NUL, links in a circle
        return [Problem(f"OUT cannot be made ({error})", str(out), "Choose another --out")]
    return problems


def check_access(out: Location) -> list[Problem]:
    """Places that are to be written to without a signature, which no store lets anybody do."""
    remedy = "Leave --anonymous out: who may write there reads public buckets as well"
    return [
        Problem(f"{name} is to be written to, and --anonymous signs nothing", str(place), remedy)
        for name, place in _written(out)
        if place.scheme in ("s3", "gs") and place.access.anonymous
    ]


def _written(out: Location) -> list[tuple[str, Location]]:
    """What a merge into ``out`` writes to, by what it is called."""
    state = [("STATE", out.upload.state)] if out.upload is not None else []
    return [("OUT", out), *state]


def _share(one: Location, two: Location) -> bool:
    """Whether one of them lies in the other, or they are the same."""
    if (one.scheme, one.root) != (two.scheme, two.root):
        return False
    paths = [Path("/", place.path) for place in (one, two)]
    a, b = (path.resolve() if one.is_local else path for path in paths)
    return a == b or a in b.parents or b in a.parents


def _below_files(name: str, place: Location) -> list[Problem]:
    above = next(path for path in (place.local, *place.local.parents) if path.exists())
    if above.is_dir():
        return []
    what = f"{name} is a file" if above == place.local else f"{name} lies below a file ({above})"
    return [Problem(what, str(place), f"Choose another --{name.lower()}")]


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
    notes, earlier = notes_on_model(out), read_plan(out)
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

"""The destination: what lies where, and whether a merge may begin there.

OUT/model-0000n-of-0000m.safetensors   published shards
OUT/model.safetensors.index.json       written when all shards are there
OUT/config.json                        written last: before it nothing loads OUT as a checkpoint
OUT/.raymeld/lease/                    who is at work
OUT/.raymeld/plan.json                 what is being done
OUT/.raymeld/recipe.yaml               the same, for who wants to do it again
OUT/.raymeld/parts/                    unfinished files of workers
OUT/.raymeld/receipts/                 one small file a finished shard
OUT/.raymeld/runs/                     how each run went
OUT/.raymeld/config.json               the config that will be published
OUT/.raymeld/ledger.parquet            one row a tensor
OUT/.raymeld/verified.json             what was checked
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from merge_core import __version__
from merge_core.errors import AbsentError, InputError, Problem, StorageError, refuse
from merge_core.model_card import CARD
from merge_core.plan import AdapterInput, MergePlan
from merge_core.published_config import config_to_publish
from merge_core.recipe_text import recipe_of
from merge_core.side_files import CONFIG, INDEX, TEMPLATES
from merge_core.stores.location import Location
from merge_core.stores.opening import is_there, open_hub_out, open_store, read_file
from merge_core.verify import LEVELS

STATE = ".raymeld"
"""Where raymeld keeps its own files."""

PLAN = f"{STATE}/plan.json"
RECIPE = f"{STATE}/recipe.yaml"
STAGED_CONFIG = f"{STATE}/{CONFIG}"
LEDGER = f"{STATE}/ledger.parquet"
VERIFIED = f"{STATE}/verified.json"
RECEIPTS = f"{STATE}/receipts"
LEASE = f"{STATE}/lease"
PROGRESS = f"{STATE}/progress.json"
RUNS = f"{STATE}/runs"


def receipt_name(index: int) -> str:
    """Where the receipt of a shard lies."""
    return f"{RECEIPTS}/shard-{index:05}.json"


def accepted_shards(out: Location) -> frozenset[int]:
    """Those that have a receipt in OUT, by their index in the plan that it holds."""
    names = (PurePosixPath(listed.name) for listed in open_store(out).list(RECEIPTS))
    numbers = (name.stem.removeprefix("shard-") for name in names if name.suffix == ".json")
    return frozenset(int(number) for number in numbers if number.isdecimal())


def is_finished(out: Location, plan: MergePlan) -> bool:
    """Whether OUT holds the committed result of exactly this plan, every file in its size."""
    earlier = read_plan(out)
    if earlier is None or earlier["fingerprint"] != plan.fingerprint:
        return False
    if earlier.get("inputs") != _inputs(plan):
        return False
    try:
        if read_file(out / CONFIG) != config_to_publish(plan):
            return False
    except StorageError:
        return False
    shards = {shard.name: shard.size for shard in plan.shards}
    sizes = {side.name: side.file.size for side in plan.side_files}
    if out.upload is None:
        sizes |= shards
    found = {listed.name: listed.size for listed in open_store(out).list()}
    made = {CARD, *[INDEX] * (len(plan.shards) > 1)}  # a card may be written on
    if not made <= found.keys() or any(found.get(name) != size for name, size in sizes.items()):
        return False
    return out.upload is None or open_hub_out(out).is_on_branch(shards)


def verified_level(out: Location) -> str:
    """The level at which the finished merge in ``out`` was verified before it was published."""
    try:
        level = json.loads(read_file(out / VERIFIED))["level"]
    except (StorageError, ValueError, KeyError, TypeError):
        return LEVELS[0]
    return level if level in LEVELS else LEVELS[0]


def check_usable(out: Location, plan: MergePlan, *, overwrite: bool = False) -> None:
    """Raise what ``prepare`` would, and write nothing.

    Raises:
        InputError: OUT holds something else, and ``overwrite`` is not given or does not apply.
        StorageError: the disk is too small.
    """
    if not is_new(out):
        earlier = read_plan(out)
        if earlier is None:
            raise InputError([not_ours(out)])
        if not overwrite and not _can_go_on(out, plan, earlier):
            raise _other_merge(out, plan, earlier)
    check_space(out, plan, freed=written_bytes(out))


def prepare(out: Location, plan: MergePlan, *, overwrite: bool = False) -> None:
    """Make OUT ready for the workers of ``plan``, which must be sealed.

    What an unfinished merge of the same plan has done stays, unless ``overwrite`` is given.

    Raises:
        InputError: OUT holds something else, and ``overwrite`` is not given or does not apply.
        StorageError: OUT cannot be made, or the disk is too small.
    """
    check_usable(out, plan, overwrite=overwrite)
    earlier = None if is_new(out) else read_plan(out)
    if earlier is not None and (overwrite or not _can_go_on(out, plan, earlier)):
        _make_room(out, earlier)
    store, config = open_store(out), config_to_publish(plan)
    store.put(STAGED_CONFIG, config)
    store.put(RECIPE, recipe_of(plan).encode())
    store.put(PLAN, json.dumps(describe(plan), indent=1).encode())


def check_prepared(out: Location, plan: MergePlan) -> None:
    """Make sure, on another machine, that OUT is the place that was made ready, and not another
    one of its name; for OUT on the hub that its state is.

    Raises:
        StorageError: it is not, or it cannot be reached from here.
    """
    try:
        there = json.loads(read_file(out / PLAN))["fingerprint"] == plan.fingerprint
    except (AbsentError, ValueError, KeyError, TypeError):
        there = False
    if not there:
        place = out if out.upload is None else out.upload.state
        what = "this node has another place of that name, or none: the driver's plan is not there"
        raise StorageError(what, str(place), "Give a place that every node reaches, or s3://.")


def check_space(out: Location, plan: MergePlan, freed: int = 0) -> None:
    """Raise StorageError if the file system of OUT has no room for the result; others grow.

    Args:
        freed: bytes that will be free before it is written.
    """
    if not out.is_local:
        return
    existing = next(path for path in (out.local, *out.local.parents) if path.exists())
    needed = sum(s.size for s in plan.shards) + sum(side.file.size for side in plan.side_files)
    free = shutil.disk_usage(existing).free + freed
    if free < needed:
        raise StorageError(
            f"no space: the result takes {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free",
            str(out),
            "Free space there, or choose another --out.",
        )


def describe(plan: MergePlan) -> dict[str, Any]:
    """The plan as plan.json keeps it."""
    return {
        "raymeld": __version__,
        "fingerprint": plan.fingerprint,
        "base": str(plan.base),
        "inputs": _inputs(plan),
        "architectures": plan.config.get("architectures"),
        "adapters": [_describe_adapter(adapter) for adapter in plan.adapters],
        "config_changes": dict(plan.config_changes),
        "keep_tied": plan.keep_tied,
        "combination": dataclasses.asdict(plan.combination),
        "simulate_nf4": plan.simulates_nf4,
        "side_files": [CARD, *(side.name for side in plan.side_files)],
        "side_sources": {
            side.name: [None if side.folder == plan.base else str(side.folder), side.file.name]
            for side in plan.side_files
            if (side.folder, side.file.name) != (plan.base, side.name)
        },
        "header_digests": list(plan.header_digests),
        "notes": list(plan.notes),
        "shards": [dataclasses.asdict(shard) for shard in plan.shards],
    }


def _describe_adapter(adapter: AdapterInput) -> dict[str, Any]:
    return {
        "path": str(adapter.path),
        "weight": adapter.weight,
        "peft_type": adapter.peft_type,
        "file": dataclasses.asdict(adapter.file),
        "tensors": dict(adapter.digests),
    }


def not_ours(out: Location) -> Problem:
    """What is wrong with an OUT that holds something else than an earlier merge."""
    return Problem(
        "OUT is not empty, and raymeld did not make it", str(out), "Choose another --out"
    )


def _inputs(plan: MergePlan) -> list[list[Any]]:
    """Name, size and pin of each base file. The fingerprint holds no pins, so that it is the same
    wherever the base lies; but two models trained from one differ in values alone, and only the
    pins tell them apart before every byte is read.
    """
    files = (*plan.base_files, *(side.file for side in plan.side_files))
    return [[file.name, file.size, file.pin] for file in files]


def is_new(out: Location) -> bool:
    """Whether nothing lies there, or nothing but what a merge leaves that wrote no plan yet."""
    others = (f for f in open_store(out).list() if not f.name.startswith(f"{STATE}/"))
    return next(others, None) is None and not is_there(out / PLAN)


def _can_go_on(out: Location, plan: MergePlan, earlier: Mapping[str, Any]) -> bool:
    """Whether what ``earlier`` finished of its shards can be part of this merge."""
    same = {name: earlier.get(name) for name in ("raymeld", "fingerprint", "inputs")}
    here = {
        "raymeld": __version__,
        "fingerprint": plan.fingerprint,
        "inputs": _inputs(plan),
    }
    return same == here and not is_there(out / CONFIG)


def _other_merge(out: Location, plan: MergePlan, earlier: Mapping[str, Any]) -> InputError:
    finished = is_there(out / CONFIG)
    what = f"OUT holds {'a finished' if finished else 'an unfinished'} merge"
    if earlier["fingerprint"] != plan.fingerprint:
        what += f" of plan {earlier['fingerprint'][:12]}; this one is {plan.fingerprint[:12]}"
    elif earlier.get("inputs") != _inputs(plan):
        what += f" of the same plan {plan.fingerprint[:12]}, from input files of other times"
    elif finished:
        what += f" of this very plan {plan.fingerprint[:12]}, but its files are missing or changed"
    else:
        what += f" by raymeld {earlier.get('raymeld')}; this is {__version__}"
    return refuse(what, str(out), "Choose another --out, or give --overwrite to replace it")


def _make_room(out: Location, earlier: Mapping[str, Any]) -> None:
    store = open_store(out)
    # config.json goes first: from here on nothing takes OUT for a checkpoint.
    shards = [shard["name"] for shard in earlier["shards"]]
    for name in (CONFIG, INDEX, *shards, *earlier["side_files"], PLAN):
        store.delete(name)
    store.sweep()
    for listed in store.list(STATE):
        if not listed.name.startswith(f"{LEASE}/"):
            store.delete(listed.name)


def written_bytes(out: Location) -> int:
    """Bytes of an earlier merge's shards, which this one replaces or needs no room for."""
    earlier = read_plan(out)
    names = {shard["name"] for shard in earlier["shards"]} if earlier else set()
    listed = (one for one in open_store(out).list() if one.name in names)
    return sum(one.size or 0 for one in listed)  # a disk, which alone may be full, tells them


def read_plan(out: Location) -> dict[str, Any] | None:
    """plan.json, or None if it is not one of ours: its names decide what --overwrite removes."""
    try:
        plan = json.loads(read_file(out / PLAN))
        names = [shard["name"] for shard in plan["shards"]] + plan["side_files"]
        ours = all(_is_inside(name) for name in names)
        texts = isinstance(plan["fingerprint"], str)
    except (StorageError, ValueError, KeyError, TypeError):
        return None
    return plan if ours and texts else None


def _is_inside(name: Any) -> bool:
    """A plain file name, or a chat template in its own folder."""
    parts = Path(name).parts
    return bool(parts) and (
        (len(parts) == 1 and parts[0] not in ("..", "/"))
        or (len(parts) == 2 and parts[0] == TEMPLATES and parts[1] != "..")
    )

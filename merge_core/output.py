"""The destination directory: what lies where, and whether a merge may begin there.

OUT/model-0000n-of-0000m.safetensors   published shards
OUT/model.safetensors.index.json       written when all shards are there
OUT/config.json                        written last: before it nothing loads OUT as a checkpoint
OUT/.raymeld/plan.json                 what is being done
OUT/.raymeld/parts/                    unfinished files of workers
OUT/.raymeld/receipts/                 one small file a finished shard
OUT/.raymeld/config.json               the config that will be published
OUT/.raymeld/ledger.parquet            one row a tensor
OUT/.raymeld/verified.json             what was checked
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

from merge_core import __version__
from merge_core.checkpoint import CONFIG, INDEX
from merge_core.errors import InputError, Problem, StorageError, refuse
from merge_core.plan import MergePlan
from merge_core.storage import reported, sync_directory, write_durably


def state_directory(out: Path) -> Path:
    """Where raymeld keeps its own files."""
    return out / ".raymeld"


def parts_directory(out: Path) -> Path:
    """Where workers write."""
    return state_directory(out) / "parts"


def receipts_directory(out: Path) -> Path:
    """Where the collector records what it accepted."""
    return state_directory(out) / "receipts"


def check_location(out: Path, base: Path, adapters: tuple[Path, ...]) -> list[Problem]:
    """Problems of where OUT lies: it may share no directory with what is read."""
    problems = []
    real = out.resolve()
    for name, path in (("BASE", base), *(("ADAPTER", adapter) for adapter in adapters)):
        other = path.resolve()
        if real == other or other in real.parents or real in other.parents:
            what = f"OUT and {name} ({path}) lie in one another"
            problems.append(Problem(what, str(out), "Choose an --out outside of what is read"))
    if out.exists() and not out.is_dir():
        problems.append(Problem("OUT is a file", str(out), "Choose another --out"))
    return problems


def check_destination(out: Path, plan: MergePlan) -> None:
    """What ``merge`` would say of OUT before it begins, as far as headers tell.

    Raises:
        InputError: OUT lies in what is read, or holds something else.
        StorageError: the disk is too small.
    """
    problems = check_location(out, plan.base, tuple(a.path for a in plan.adapters))
    if not problems and out.is_dir() and any(out.iterdir()) and _read_plan(out) is None:
        problems.append(_not_ours(out))
    if problems:
        raise InputError(problems)
    check_space(out, plan)


def is_finished(out: Path, fingerprint: str) -> bool:
    """Whether OUT holds the committed result of exactly this plan."""
    plan = _read_plan(out)
    return plan is not None and plan["fingerprint"] == fingerprint and (out / CONFIG).exists()


def prepare(out: Path, plan: MergePlan, *, overwrite: bool = False) -> None:
    """Make OUT ready for the workers of ``plan``, which must be sealed.

    Raises:
        InputError: OUT holds something else, and ``overwrite`` is not given or does not apply.
        StorageError: OUT cannot be made, or the disk is too small.
    """
    if out.exists() and any(out.iterdir()):
        _make_room(out, plan, overwrite)
    check_space(out, plan)
    with reported(out):
        for directory in (parts_directory(out), receipts_directory(out)):
            directory.mkdir(parents=True, exist_ok=True)
    state = state_directory(out)
    write_durably(state / CONFIG, config_to_publish(plan))
    write_durably(state / "plan.json", json.dumps(describe(plan), indent=1).encode())
    sync_directory(out)
    sync_directory(out.parent)


def check_space(out: Path, plan: MergePlan) -> None:
    """Raise StorageError if the file system of OUT has no room for the result."""
    existing = next(path for path in (out, *out.parents) if path.exists())
    needed, free = sum(shard.size for shard in plan.shards), shutil.disk_usage(existing).free
    if free < needed:
        raise StorageError(
            f"no space: the result takes {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free",
            str(out),
            "Free space there, or choose another --out.",
        )


def config_to_publish(plan: MergePlan) -> bytes:
    """The result's config.json: the base's bytes, unless the merge changed a field."""
    if not plan.config_changes:
        with reported(plan.base / CONFIG):
            return (plan.base / CONFIG).read_bytes()
    return json.dumps({**plan.config, **plan.config_changes}, indent=2).encode() + b"\n"


def describe(plan: MergePlan) -> dict[str, Any]:
    """The plan as plan.json keeps it."""
    return {
        "raymeld": __version__,
        "fingerprint": plan.fingerprint,
        "base": str(plan.base),
        "adapters": [{"path": str(a.path), "weight": a.weight} for a in plan.adapters],
        "config_changes": dict(plan.config_changes),
        "side_files": [file.name for file in plan.side_files],
        "shards": [dataclasses.asdict(shard) for shard in plan.shards],
    }


def _not_ours(out: Path) -> Problem:
    return Problem(
        "OUT is not empty, and raymeld did not make it", str(out), "Choose another --out"
    )


def _make_room(out: Path, plan: MergePlan, overwrite: bool) -> None:
    earlier = _read_plan(out)
    if earlier is None:
        raise InputError([_not_ours(out)])
    state = "a finished" if (out / CONFIG).exists() else "an unfinished"
    if not overwrite:
        raise refuse(
            f"OUT holds {state} merge of plan {earlier['fingerprint'][:12]};"
            f" this one is {plan.fingerprint[:12]}",
            str(out),
            "Choose another --out, or give --overwrite to replace it",
        )
    with reported(out):
        # config.json goes first: from here on nothing takes OUT for a checkpoint.
        names = [CONFIG, INDEX, *(s["name"] for s in earlier["shards"]), *earlier["side_files"]]
        for name in names:
            (out / name).unlink(missing_ok=True)
        shutil.rmtree(state_directory(out))


def _read_plan(out: Path) -> dict[str, Any] | None:
    try:
        plan = json.loads((state_directory(out) / "plan.json").read_bytes())
    except (OSError, ValueError):
        return None
    return plan if isinstance(plan, dict) else None

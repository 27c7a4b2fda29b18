"""A whole merge in one process."""

from __future__ import annotations

import functools
import importlib
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from merge_core.claim import begin, claim
from merge_core.commit import Assembly
from merge_core.errors import refuse
from merge_core.history import History, recorded
from merge_core.inline import merge_shards
from merge_core.ledger import Receipt
from merge_core.plan import MergePlan
from merge_core.progress import Progress, Watch, in_turn
from merge_core.stores.location import Location, Place, locate_out
from merge_core.upload import check_scratch, published_at
from merge_core.verdict import conclude, unproven, verify_deeper
from merge_core.verify import FileCheck, VerifyReport, check_file, verify

if TYPE_CHECKING:
    from merge_core.memory import LaneChoice


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeResult:
    """What a merge did."""

    out: Location
    url: str | None
    """Of the commit that has it, if ``out`` is a model on the hub and it is published."""
    fingerprint: str
    receipts: tuple[Receipt, ...]
    """One a shard; empty if OUT already held this very merge."""
    resumed: int
    """Shards that an earlier run had finished, and that were proven instead of merged."""
    deferred: tuple[int, ...]
    """Shards that are left to other stages; the result is not published while there are any."""
    verified: VerifyReport | None
    seconds: float


def merge(
    plan: MergePlan,
    out: Place,
    *,
    level: str = "digest",
    device: str = "auto",
    overwrite: bool = False,
    choice: LaneChoice | None = None,
    watch: Watch | None = None,
    say: Callable[[str], None] | None = None,
) -> MergeResult:
    """Merge ``plan`` into the folder ``out``, verify it, and publish it.

    Args:
        plan: from ``planner.make_plan``.
        out: a folder that does not exist or is empty, see ``stores.location``.
        level: what is verified before the result is published, see ``merge_core.verify``.
        device: ``auto``, ``cpu`` or ``cuda``, for what a device map does not pin.
        overwrite: replace an earlier merge in ``out``.
        choice: lanes and size of reads; None lets the free memory decide.
        watch: called several times a second; what it raises stops the merge.
        say: called with what a person may want to know while it happens.

    Raises:
        InputError: the adapters hold NaN or infinity, or ``out`` cannot be used.
        VerificationError: the result failed a check and was not published.
        RaymeldError: the merge failed; nothing that loads as a checkpoint is left.
    """
    clock, watch, say = time.perf_counter(), watch or _unwatched, say or _unheard
    target = locate_out(out, plan.base.access)
    _check_device(plan, device)
    importing = _imported_meanwhile("merge_core.worker")  # torch takes seconds
    if "cuda" in {device, *plan.pinned}:  # refused before OUT is touched, if there is none
        importing.result().pick_device("cuda")
    plan = begin(plan, target, level)
    with claim(plan, target, overwrite=overwrite, say=say) as holder:
        if holder is None:
            check = functools.partial(verify, run=in_turn("verifying", watch, _size_in(plan)))
            return result_of(plan, target, {}, verify_deeper(target, level, check), clock)
        if memory := check_scratch(target):
            say(f"{memory}: each file of the result lies there until it is sent")
        assembly = Assembly(plan, target, holder.run)
        options = {"address": "inline", "device": device, "verify": level}
        with recorded(target, holder, options, watch, say) as history:
            resumed = _resume(assembly, plan, history.watch)
            merge_shards(plan, target, assembly, device, choice, history)
            report = None
            if len(assembly.receipts) == len(plan.shards):
                report = _finish(assembly, plan, target, level, history)
    return result_of(plan, target, assembly.receipts, report, clock, resumed)


def _imported_meanwhile(name: str) -> Future[Any]:
    """A module, as soon as a thread has imported it."""
    pool = ThreadPoolExecutor(1)
    importing = pool.submit(importlib.import_module, name)
    pool.shutdown(wait=False)
    return importing


def _check_device(plan: MergePlan, device: str) -> None:
    others = plan.pinned - {device}
    if device != "auto" and others:
        what = f"the device map pins layers to {' and '.join(sorted(others))}"
        raise refuse(what, f"--device {device}", "Leave --device out, or take another map")


def _resume(assembly: Assembly, plan: MergePlan, watch: Watch) -> int:
    """Prove what an earlier run finished, and forget what is not as its receipt says."""
    checks = assembly.resume()
    results = in_turn("proving", watch, _size_in(plan))(check_file, list(checks.values()))
    for index in unproven(checks, results):
        assembly.forget(index)
    return len(assembly.receipts)


def _finish(
    assembly: Assembly, plan: MergePlan, out: Location, level: str, history: History
) -> VerifyReport:
    """Verify the result and publish it."""
    assembly.write_record()
    run = in_turn("verifying", history.watch, _size_in(plan))
    report = verify(out, level, committed=False, run=run)
    history.verified(report)
    conclude(assembly, report)
    return report


def _unwatched(progress: Progress) -> None:
    """What ``watch`` is when nobody watches."""


def _unheard(line: str) -> None:
    """What ``say`` is when nobody listens."""


def _size_in(plan: MergePlan) -> Callable[[FileCheck], int]:
    """Bytes of the file that a check is about, of those that the plan makes."""
    sizes = {shard.name: shard.size for shard in plan.shards}
    return lambda check: sizes.get(check.file.name, 0)


def result_of(
    plan: MergePlan,
    out: Location,
    receipts: Mapping[int, Receipt],
    report: VerifyReport | None,
    clock: float,
    resumed: int = 0,
) -> MergeResult:
    """The result of a merge that began at ``clock``, by ``time.perf_counter``."""
    return MergeResult(
        out=out,
        url=published_at(out),
        fingerprint=plan.fingerprint,
        receipts=tuple(receipts[index] for index in sorted(receipts)),
        resumed=resumed,
        deferred=tuple(n for n in range(len(plan.shards)) if receipts and n not in receipts),
        verified=report,
        seconds=time.perf_counter() - clock,
    )

"""The driver: a merge on Ray, from the sealed plan to the published checkpoint."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial

from actors.identity import identify
from actors.kept_collector import KeptCollector
from actors.metrics import driver_line
from actors.pool import Pool, node_resources
from cluster.checking import verify_on_ray
from cluster.loop import Loop
from cluster.merging import Merging
from cluster.session import LOCAL, session
from cluster.timing import Timing
from cluster.workers import ClusterOptions, size_fleet
from merge_core.claim import begin, check_out, claim, holds_result
from merge_core.history import recorded
from merge_core.lease import is_held
from merge_core.merge import MergeResult, result_of
from merge_core.plan import MergePlan
from merge_core.progress import Watch
from merge_core.reachable import refuse_private
from merge_core.stores.last_writes import write_last
from merge_core.stores.location import Location, Place, locate_out
from merge_core.stores.opening import open_store
from merge_core.verdict import conclude, verify_deeper


def merge_on_ray(
    plan: MergePlan,
    out: Place,
    options: ClusterOptions,
    *,
    level: str = "digest",
    overwrite: bool = False,
    watch: Watch,
    say: Callable[[str], None],
) -> MergeResult:
    """Merge ``plan`` into ``out`` with workers on Ray; see ``merge_core.merge.merge``.

    Args:
        say: called with every decision that a person may want to know about.

    Raises:
        RaymeldError: and its subclasses, as the merge in one process does.
    """
    clock, target = time.perf_counter(), locate_out(out, plan.base.access)
    kept = target if target.upload is None else target.upload.state
    refuse_private(plan.base, kept, *(adapter.path for adapter in plan.adapters))
    plan = begin(plan, target, level)
    if not overwrite and holds_result(target, plan, say):  # it needs no Ray, unless it is read back
        readers = replace(options, device="cpu", cpu_workers=0)
        spread = partial(verify_on_ray, options=readers, watch=watch, say=say)
        return result_of(plan, target, {}, verify_deeper(target, level, spread), clock)
    check_out(target, plan, overwrite=overwrite)
    say("starting Ray" if options.address == LOCAL else f"connecting to {options.address}")
    with session(options.address, use_gpus=options.device != "cpu"):
        if options.address != LOCAL:
            say(driver_line())
        fleet = size_fleet(options, node_resources(), len(plan.stage), plan.pinned)
        with claim(plan, target, overwrite=overwrite, say=say) as holder:
            if holder is None:  # somebody else has finished it in between
                return result_of(plan, target, {}, verify_deeper(target, level), clock)
            chosen = {**options.chosen, "verify": level}
            with (
                recorded(target, holder, chosen, watch, say) as history,
                _stopped_parts(target, holder.run),
                closing(KeptCollector(plan, target, holder.run, options.collector)) as collector,
                closing(Pool(identify(), fleet.workers, options.merger, (plan, target))) as pool,
            ):
                for line in fleet.lines:
                    history.say(line)
                merging = Merging(plan, target, level, collector, history)
                loop = Loop(
                    pool,
                    fleet,
                    options.start_timeout,
                    merging.settle,
                    history.say,
                    history.watch,
                    Timing(history.attempt),
                )
                resumed = merging.run(loop)
                receipts = collector.call("receipts")  # publishing removes them
                report = None
                if len(receipts) == len(plan.shards):
                    report = merging.verify(loop)
                    history.verified(report)
                    conclude(merging, report)
    return result_of(plan, target, receipts, report, clock, resumed)


@contextmanager
def _stopped_parts(out: Location, run: str) -> Iterator[None]:
    """Removes, at the end, the parts of workers that were stopped; the next merge would, too.

    Not without the lease: the parts there would be those of the merge that took it over.
    """
    try:
        yield
    finally:
        write_last(out, partial(_sweep, out, run))


def _sweep(out: Location, run: str) -> None:
    if is_held(out, run):
        open_store(out).sweep()

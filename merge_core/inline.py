"""The shards of a merge in this process, one after the other."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from functools import partial
from itertools import zip_longest
from typing import TYPE_CHECKING

from merge_core.background import in_background
from merge_core.commit import Assembly
from merge_core.errors import DeviceMemoryError
from merge_core.history import Attempt, History
from merge_core.ledger import Receipt
from merge_core.plan import MergePlan, Shard
from merge_core.progress import Progress, WorkerProgress
from merge_core.stores.last_writes import write_last
from merge_core.stores.location import Location

if TYPE_CHECKING:
    from merge_core.memory import LaneChoice
    from merge_core.worker import ShardWorker

ATTEMPTS = 3
"""Tries of a shard that runs out of memory, each with a third of the lanes. Other errors would meet
the same process, device and disk again, so they end the merge at once."""


def merge_shards(
    plan: MergePlan,
    out: Location,
    assembly: Assembly,
    device: str,
    choice: LaneChoice | None,
    history: History,
) -> None:
    """Merge what ``assembly`` lacks of the stage.

    A store takes a second to make an object out of its parts, so a shard is published while the
    next one is merged.

    Raises:
        RaymeldError: see ``merge.merge``.
    """
    from merge_core.worker import ShardWorker, pick_device  # torch takes seconds

    shards = [plan.shards[n] for n in sorted(plan.stage - assembly.receipts.keys())]
    with contextlib.ExitStack() as stack:

        @functools.cache
        def worker_on(where: str) -> ShardWorker:
            worker = ShardWorker(
                plan,
                out,
                where,
                choice=choice,
                say=lambda what: history.note(f"this process {what}"),
            )
            return stack.enter_context(contextlib.closing(worker))

        publishing: list[Future[bool]] = []
        stack.callback(write_last, out, lambda: wait(publishing))  # before the lease is given back
        for shard, then in zip_longest(shards, shards[1:]):
            worker = worker_on(pick_device(shard.device or device))
            following = then if then is not None and then.device == shard.device else None
            tick = _ticking(worker, plan, shard, history, publishing)
            receipt = _merge_shard(worker, shard, following, history, tick)
            history.note(receipt.note)
            for one in publishing:
                one.result()
            publishing[:] = [in_background(partial(assembly.accept, receipt))]
        for one in publishing:
            one.result()


def _ticking(
    worker: ShardWorker,
    plan: MergePlan,
    shard: Shard,
    history: History,
    publishing: Sequence[Future[bool]],
) -> Callable[[int], None]:
    """What has a history told of the bytes of a shard that are done, and raises what ended the
    publication of the one before.
    """
    before = sum(plan.shards[n].size for n in plan.stage if n < shard.index)
    total = sum(plan.shards[n].size for n in plan.stage)

    def tick(done: int) -> None:
        for one in publishing:
            if one.done():
                one.result()
        doing = WorkerProgress(
            worker="inline",
            device=worker.describe_device(),
            doing=shard.name,
            done=done,
            size=shard.size,
        )
        history.watch(Progress(phase="merging", done=before + done, total=total, workers=(doing,)))

    return tick


def _merge_shard(
    worker: ShardWorker,
    shard: Shard,
    then: Shard | None,
    history: History,
    tick: Callable[[int], None],
) -> Receipt:
    following = None if then is None else then.index
    for attempt in range(1, ATTEMPTS + 1):
        began = time.time()
        try:
            return worker.merge(shard.index, attempt, tick, then=following)
        except DeviceMemoryError as error:
            history.attempt(Attempt.failed("inline", shard.name, began, error))
            if attempt == ATTEMPTS:
                raise
    raise AssertionError("unreachable: the last attempt returns or raises")

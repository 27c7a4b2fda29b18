"""The driver: a merge on Ray, from the sealed plan to the published checkpoint."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from actors.events import ItemDone, ItemFailed
from actors.identity import identify
from actors.pool import Pool, node_resources
from cluster.patience import Patience
from cluster.schedule import Abort, Assign, Command, Release, Schedule, Start
from cluster.session import LOCAL, session
from cluster.workers import ClusterOptions, amounts, size_pool
from merge_core.errors import InputError, RaymeldError, counted
from merge_core.merge import MergeResult, begin, claim, result_of
from merge_core.output import check_usable, is_finished, parts_directory
from merge_core.plan import MergePlan
from merge_core.progress import Progress, ProgressFile, Watch, WorkerProgress
from merge_core.verdict import conclude, unproven, verify_deeper
from merge_core.verify import FileCheck, FileResult, VerifyReport, verify

WAIT_SECONDS = 0.25
"""How long the driver waits for the next event before it looks at progress and Ctrl-C again."""

STATUS_SECONDS = 1.0
"""How often workers are asked how far they are; an answer takes some milliseconds."""


def merge_on_ray(
    plan: MergePlan,
    out: str | Path,
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
    clock, target = time.perf_counter(), Path(out).absolute()
    plan = begin(plan, target, level)
    if not overwrite and is_finished(target, plan):  # it needs no Ray
        return result_of(plan, target, {}, verify_deeper(target, level), clock)
    check_usable(target, plan, overwrite=overwrite)
    say("starting Ray" if options.address == LOCAL else f"connecting to {options.address}")
    with session(options.address, use_gpus=options.device != "cpu"):
        workers, most = size_pool(options, node_resources(), len(plan.shards))
        with (
            claim(plan, target, overwrite=overwrite) as run_id,
            ProgressFile(target, watch, say) as progress,
        ):
            if run_id is None:  # somebody else has finished it in between
                return result_of(plan, target, {}, verify_deeper(target, level), clock)
            needs = amounts(workers.resources)
            progress.say(f"workers: at most {most} on {workers.device}, each with {needs}")
            driver = identify()
            pool = Pool(plan, target, run_id, driver, workers, options.merger, options.collector)
            patience = Patience(options.start_timeout, needs, progress.say)
            run = Run(plan, pool, most, progress, patience)
            try:
                resumed = run.resume()
                run.merge()
                report = _commit(pool, target, level, run)
                receipts = pool.collect("receipts")
            finally:
                pool.close()
                for part in parts_directory(target).glob("*.part"):  # of workers that were stopped
                    part.unlink(missing_ok=True)
    return result_of(plan, target, receipts, report, clock, resumed)


def _commit(pool: Pool, out: Path, level: str, run: Run) -> VerifyReport:
    pool.collect("write_record")
    report = verify(out, level, committed=False, run=run.check)
    conclude(_Publisher(pool), report)
    return report


@dataclass(slots=True)
class Run:
    """The schedule, the pool, and the loop between them."""

    plan: MergePlan
    pool: Pool
    most: int
    progress: ProgressFile
    patience: Patience
    _schedule: Schedule = field(init=False)
    _calls: dict[int, tuple[str, tuple[Any, ...]]] = field(default_factory=dict)
    _results: dict[int, Any] = field(default_factory=dict)
    _sizes: dict[int, int] = field(default_factory=dict)
    _phase: str = "merging"
    _asked: float = 0.0
    _greeted: set[int] = field(default_factory=set)
    _numbers: itertools.count[int] = field(init=False)
    """Of items that are no shards; a shard's item has its index."""

    def __post_init__(self) -> None:
        self._schedule = Schedule({}, self.most, self._name)
        self._numbers = itertools.count(len(self.plan.shards))

    def resume(self) -> int:
        """Have the shards of an earlier run proven; how many were."""
        checks: dict[int, FileCheck] = self.pool.collect("resume")
        if not checks:
            return 0
        failed = unproven(checks, self._check("proving", list(checks.values())))
        for index in failed:
            self.progress.say(
                f"{self.plan.shards[index].name} is not as its receipt says; merging it again"
            )
            self.pool.collect("forget", index)
        proven = len(checks) - len(failed)
        self.progress.say(
            f"{proven} of {counted(len(self.plan.shards), 'shard')} were there and are proven"
        )
        return proven

    def merge(self) -> None:
        """Have every shard merged and accepted that is not done."""
        done = self.pool.collect("receipts")
        sizes = {s.index: s.size for s in self.plan.shards if s.index not in done}
        self._work("merging", sizes, {n: ("merge", (n,)) for n in sizes})

    def check(
        self, _check_file: Callable[[FileCheck], FileResult], checks: Sequence[FileCheck]
    ) -> Iterable[FileResult]:
        """Spread the checks of a verification over the workers, as more items of the schedule.

        The function is what ``Merger.check`` calls on the other side.
        """
        return self._check("verifying", checks)

    def _check(self, phase: str, checks: Sequence[FileCheck]) -> list[FileResult]:
        numbers = list(itertools.islice(self._numbers, len(checks)))
        by_name = {shard.name: shard.size for shard in self.plan.shards}
        sizes = [by_name.get(Path(check.path).name, 0) for check in checks]
        calls = {n: ("check", (check,)) for n, check in zip(numbers, checks, strict=True)}
        results = self._work(phase, dict(zip(numbers, sizes, strict=True)), calls)
        return [results[n] for n in numbers]

    def _work(
        self,
        phase: str,
        sizes: Mapping[int, int],
        calls: Mapping[int, tuple[str, tuple[Any, ...]]],
    ) -> Mapping[int, Any]:
        self._phase = phase
        self._sizes, self._results = dict(sizes), {}
        self._calls |= calls
        self._schedule.extend(sizes)
        self._obey(self._schedule.begin())
        while not self._schedule.finished:
            for event in self.pool.next_events(WAIT_SECONDS):
                settled = self._settle(event) if isinstance(event, ItemDone) else event
                self._obey(self._schedule.handle(settled))
            self.patience.look(time.monotonic(), len(self.pool.lanes), self.pool.pending)
            self._report()
        return self._results

    def _settle(self, event: ItemDone) -> ItemDone | ItemFailed:
        """A merged part is done only when the collector has accepted it."""
        if self._calls[event.item][0] == "merge":
            try:
                self.pool.collect("accept", event.result)
            except InputError:
                raise
            except RaymeldError as error:
                return ItemFailed(worker=event.worker, item=event.item, error=error)
        self._results[event.item] = event.result
        return event

    def _obey(self, commands: Sequence[Command]) -> None:
        for log in (self._schedule.log, self.pool.log):
            for line in log:
                self.progress.say(line)
            log.clear()
        for command in commands:
            match command:
                case Start(worker=worker, delay=delay):
                    self.pool.start(worker, delay)
                case Assign(worker=worker, item=item, attempt=attempt):
                    method, arguments = self._calls[item]
                    extra = (attempt,) if method == "merge" else ()
                    self.pool.assign(worker, item, method, *arguments, *extra)
                case Release(worker=worker):
                    self.pool.release(worker)
                case Abort():
                    raise self._failure(command)

    def _failure(self, abort: Abort) -> Exception:
        if isinstance(abort.cause, InputError):
            return abort.cause
        if abort.item is None:
            return RaymeldError(abort.reason, "workers", "Ray's logs of that worker say more.")
        kind = type(abort.cause) if isinstance(abort.cause, RaymeldError) else RaymeldError
        return kind(abort.reason, self._name(abort.item), "Nothing was published.")

    def _name(self, item: int) -> str:
        shards = self.plan.shards
        if item < len(shards):
            return shards[item].name
        return f"check of {Path(self._calls[item][1][0].path).name}"

    def _report(self) -> None:
        for worker in self.pool.lanes.keys() - self._greeted:
            self._greeted.add(worker)
            self.progress.say(f"worker-{worker}: {self.pool.lanes[worker]}")
        if time.monotonic() - self._asked < STATUS_SECONDS:
            return
        self._asked = time.monotonic()
        for event in self.pool.draining():
            self._obey(self._schedule.handle(event))
        workers = tuple(
            WorkerProgress(worker=f"worker-{n}", device=device, doing=doing, done=done, size=size)
            for n, (device, doing, done, size) in sorted(self.pool.status().items())
        )
        finished = sum(self._sizes[n] for n in self._results)
        under_way = sum(worker.done for worker in workers)
        total = sum(self._sizes.values())
        self.progress.watch(
            Progress(
                phase=self._phase,
                done=min(finished + under_way, total),
                total=total,
                workers=workers,
            )
        )


@dataclass(frozen=True, slots=True)
class _Publisher:
    """The collector, as ``conclude`` wants an assembly."""

    pool: Pool

    def publish(self, verified: Mapping[str, Any]) -> None:
        """Have the collector publish."""
        self.pool.collect("publish", verified)

"""The loop between the schedule, which decides, and the pool, which does."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from actors.events import Event, ItemDone, ItemFailed
from actors.pool import Pool
from cluster.commands import Abort, Assign, Command, Release, Start
from cluster.patience import Patience
from cluster.schedule import Schedule
from cluster.tasks import PHASES, Task
from cluster.workers import Fleet, amounts
from merge_core.errors import InputError, RaymeldError
from merge_core.progress import Progress, Watch, WorkerProgress

WAIT_SECONDS = 0.25
"""How long the driver waits for the next event before it looks at progress and Ctrl-C again."""

STATUS_SECONDS = 1.0
"""How often workers are asked how far they are; an answer takes some milliseconds."""


@dataclass(slots=True)
class Loop:
    """Runs tasks on the pool until all are done.

    Args:
        fleet: the kinds of worker.
        start_timeout: seconds without any worker of a kind after which it is given up.
        settle: called with each result that counts; may raise, say that the item failed after all,
            or add tasks.
        say: called with every decision.
        watch: called with the progress, once a second.
    """

    pool: Pool
    fleet: Fleet
    start_timeout: float
    settle: Callable[[ItemDone], ItemDone | ItemFailed]
    say: Callable[[str], None]
    watch: Watch
    tasks: list[Task] = field(default_factory=list)
    schedule: Schedule = field(init=False)
    _patience: list[Patience] = field(init=False)
    _finished: set[int] = field(default_factory=set)
    _greeted: set[int] = field(default_factory=set)
    _asked: float = 0.0

    def __post_init__(self) -> None:
        self.schedule = Schedule(self.fleet.kinds, lambda number: self.tasks[number].name)
        self._patience = [
            Patience(options.device, self.start_timeout, amounts(options.resources), self.say)
            for options in self.fleet.workers
        ]

    def add(self, tasks: Sequence[Task]) -> range:
        """Have more done; their numbers."""
        numbers = range(len(self.tasks), len(self.tasks) + len(tasks))
        self.tasks += tasks
        self.schedule.extend({n: self.tasks[n].item for n in numbers})
        return numbers

    def run(self) -> None:
        """Come back when nothing is left to do.

        Raises:
            RaymeldError: a task failed too often, or no worker came up; what ``settle`` raised.
        """
        self._obey(self.schedule.look(time.monotonic()))
        while not self.schedule.finished:
            for event in self.pool.next_events(WAIT_SECONDS):
                self._handle(event)
            if time.monotonic() - self._asked >= STATUS_SECONDS:
                self._look()

    def _handle(self, event: Event) -> None:
        if isinstance(event, ItemDone):
            if not self.schedule.awaits(event.worker, event.item):
                return  # a second worker was first
            event = self.settle(event)
            if isinstance(event, ItemDone):
                self._finished.add(event.item)
        self._obey(self.schedule.handle(event, time.monotonic()))

    def _obey(self, commands: Sequence[Command]) -> None:
        for line in self.schedule.log:
            self.say(line)
        self.schedule.log.clear()
        for command in commands:
            match command:
                case Start(worker=worker, kind=kind, delay=delay):
                    self.pool.start(worker, kind, delay)
                case Assign(worker=worker, item=item):
                    task = self.tasks[item]
                    self.pool.assign(worker, item, task.method, *task.arguments(command))
                case Release(worker=worker):
                    self.pool.release(worker)
                case Abort():
                    raise self._failure(command)

    def _failure(self, abort: Abort) -> Exception:
        if isinstance(abort.cause, InputError):
            return abort.cause
        if abort.item is None:
            remedy = "Ray's logs of that worker say more."
            return abort.cause or RaymeldError(abort.reason, "workers", remedy)
        kind = type(abort.cause) if isinstance(abort.cause, RaymeldError) else RaymeldError
        return kind(abort.reason, self.tasks[abort.item].name, "Nothing was published.")

    def _look(self) -> None:
        """What happens once a second, whatever the workers do."""
        self._asked = time.monotonic()
        for worker, greeting in self.pool.greetings.items():
            if worker not in self._greeted:
                self._greeted.add(worker)
                self.say(f"worker-{worker} is {greeting}")
        for event in self.pool.draining():
            self._handle(event)
        for patience in self._patience:
            end = patience.look(self._asked, *self.pool.count(patience.kind))
            if end is not None:
                self._handle(end)
        self._obey(self.schedule.look(self._asked))
        self._report()

    def _report(self) -> None:
        """The phase is that of the most urgent task that is not done."""
        open_ranks = [t.item.rank for n, t in enumerate(self.tasks) if n not in self._finished]
        if not open_ranks:
            return
        rank = min(open_ranks)
        assigned, workers, under_way = self.pool.assigned, [], 0
        for worker, (device, doing, done, size) in sorted(self.pool.status().items()):
            workers.append(
                WorkerProgress(
                    worker=f"worker-{worker}", device=device, doing=doing, done=done, size=size
                )
            )
            item = assigned.get(worker)
            under_way += done if item is not None and self.tasks[item].item.rank == rank else 0
        sizes: Counter[bool] = Counter()
        for number, task in enumerate(self.tasks):
            sizes[number in self._finished] += task.item.size if task.item.rank == rank else 0
        total = sizes.total()
        self.watch(
            Progress(
                phase=PHASES[rank],
                done=min(sizes[True] + under_way, total),
                total=total,
                workers=tuple(workers),
            )
        )

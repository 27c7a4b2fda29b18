"""The loop between the schedule, which decides, and the pool, which does."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from actors.events import Event, ItemDone, ItemFailed, WorkerLost
from actors.metrics import Metrics
from actors.pool import Pool
from cluster.commands import Abort, Assign, Command, Release, Start
from cluster.patience import Patience
from cluster.schedule import Schedule
from cluster.tasks import PHASES, RESULTS, Task
from cluster.timing import Timing
from cluster.workers import Fleet, amounts
from merge_core.errors import InputError, RaymeldError
from merge_core.progress import Progress, Watch, WorkerProgress
from merge_core.stores.scratch import WAITS

WAIT_SECONDS = 0.25
"""How long the driver waits for the next event before it looks at progress and Ctrl-C again."""

LOOK_SECONDS = 1.0
"""How often the driver looks at what no event tells: draining nodes, stragglers, progress."""

STATUS_SECONDS = 5.0
"""Between two looks at how far the workers are, at most: who watches wants to see it move."""

STATUS_SHARE = 0.1
"""Of the driver's time, at most, for asking the workers how far they are. It takes 0.4 ms a worker,
and half a second where one does not answer: of a thousand, each is asked every four seconds."""


@dataclass(slots=True)
class Loop:
    """Runs tasks on the pool until all are done.

    Args:
        fleet: the kinds of worker.
        start_timeout: seconds without any worker of a kind after which it is given up.
        settle: called with each result that counts; may raise, say that the item failed after all,
            or add tasks.
        say: called with every decision.
        watch: called with the progress, once a second or, with hundreds of workers, less often.
        timing: told what each worker begins and ends.
    """

    pool: Pool
    fleet: Fleet
    start_timeout: float
    settle: Callable[[ItemDone], ItemDone | ItemFailed]
    say: Callable[[str], None]
    watch: Watch
    timing: Timing
    tasks: list[Task] = field(default_factory=list)
    schedule: Schedule = field(init=False)
    _metrics: Metrics = field(default_factory=Metrics)
    _patience: list[Patience] = field(init=False)
    _open: Counter[int] = field(default_factory=Counter)
    """Tasks that are not done, by rank."""
    _size: Counter[int] = field(default_factory=Counter)
    _done: Counter[int] = field(default_factory=Counter)
    """Bytes of all tasks of a rank, and of those that are done: kept, because counting ten thousand
    tasks anew each second took the driver longer than all else that it does for them."""
    _greeted: set[int] = field(default_factory=set)
    _waiting: set[int] = field(default_factory=set)
    """Workers that were said to wait for something."""
    _looked: float = 0.0
    _ask: float = 0.0
    """Not before this time."""

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
        for task in tasks:
            self._open[task.item.rank] += 1
            self._size[task.item.rank] += task.item.size
        self.schedule.extend({n: self.tasks[n].item for n in numbers})
        return numbers

    def run(self) -> None:
        """Come back when nothing is left to do.

        Raises:
            RaymeldError: a task failed too often, or no worker came up; what ``settle`` raised.
        """
        try:
            self._obey(self.schedule.look(time.monotonic()))
            while not self.schedule.finished:
                for event in self.pool.next_events(WAIT_SECONDS):
                    self._handle(event)
                if time.monotonic() - self._looked >= LOOK_SECONDS:
                    self._look()
            self._report_end()
        finally:  # Ray would go on reporting what was shown last
            idle = dict.fromkeys((kind.name for kind in self.fleet.kinds), 0)
            self._metrics.show(idle, idle)

    def _handle(self, event: Event) -> None:
        well = ""
        if isinstance(event, ItemDone):
            if not self.schedule.awaits(event.worker, event.item):
                return  # a second worker was first
            event = self.settle(event)
            if isinstance(event, ItemDone):
                item = self.tasks[event.item].item
                self._open[item.rank] -= 1
                self._done[item.rank] += item.size
                well = RESULTS[item.rank]
        if isinstance(event, ItemDone | ItemFailed | WorkerLost):
            device = self.schedule.at_work(event.worker)
            if device is not None:
                self._metrics.count(event, device, well)
        self.timing.handle(event)
        self._obey(self.schedule.handle(event, time.monotonic()))

    def _obey(self, commands: Sequence[Command]) -> None:
        for line in self.schedule.log:
            self.say(line)
        self.schedule.log.clear()
        for command in commands:
            match command:
                case Start(worker=worker, kind=kind, delay=delay):
                    self.pool.start(worker, kind, delay)
                case Assign(worker=worker, item=item, then=number):
                    task, then = self.tasks[item], None if number is None else self.tasks[number]
                    self.timing.begin(worker, task)
                    self.pool.assign(worker, item, task.method, *task.arguments(command, then))
                case Release(worker=worker):
                    self.timing.release(worker)
                    self.pool.release(worker)
                case Abort():
                    raise self._failure(command)

    def _failure(self, abort: Abort) -> Exception:
        if isinstance(abort.cause, InputError):
            return abort.cause
        if abort.item is None:
            return self._no_workers(abort)
        kind = type(abort.cause) if isinstance(abort.cause, RaymeldError) else RaymeldError
        return kind(abort.reason, self.tasks[abort.item].name, "Nothing was published.")

    def _no_workers(self, abort: Abort) -> Exception:
        cause, remedy = abort.cause, "Ray's logs of that worker say more."
        if isinstance(cause, RaymeldError):
            if str(cause) == abort.reason:
                return cause
            remedy = cause.remedy or remedy
        return RaymeldError(abort.reason, "workers", remedy)

    def _look(self) -> None:
        """What happens once a second, whatever the workers do."""
        self._looked = time.monotonic()
        for worker, greeting in self.pool.greetings.items():
            if worker not in self._greeted:
                self._greeted.add(worker)
                self.say(f"worker-{worker} is {greeting}")
        for event in self.pool.draining():
            self._handle(event)
        for patience in self._patience:
            end = patience.look(self._looked, *self.pool.count(patience.kind))
            if end is not None:
                self._handle(end)
        self._obey(self.schedule.look(self._looked))
        self._show()
        began = time.monotonic()
        if began >= self._ask:
            self._report()
            spent = time.monotonic() - began
            self._ask = began + min(spent / STATUS_SHARE, STATUS_SECONDS)

    def _show(self) -> None:
        kinds = [kind.name for kind in self.fleet.kinds]
        busy = Counter(self.schedule.at_work(worker) for worker in self.pool.assigned)
        up = {kind: self.pool.count(kind)[0] for kind in kinds}
        self._metrics.show({kind: busy[kind] for kind in kinds}, up)

    def _report_end(self) -> None:
        """All is done: who looks once a second has not seen that yet."""
        rank = max(self._size, default=None)
        if rank is not None:
            size = self._size[rank]
            self.watch(Progress(phase=PHASES[rank], done=size, total=size, workers=()))

    def _report(self) -> None:
        """The phase is that of the most urgent task that is not done."""
        rank = min((rank for rank, count in self._open.items() if count), default=None)
        if rank is None:
            return
        assigned, workers, under_way = self.pool.assigned, [], 0
        for worker, (device, doing, done, size) in sorted(self.pool.status().items()):
            if doing.startswith(WAITS) and worker not in self._waiting:
                self._waiting.add(worker)
                self.say(f"worker-{worker} {doing}")
            workers.append(
                WorkerProgress(
                    worker=f"worker-{worker}", device=device, doing=doing, done=done, size=size
                )
            )
            item = assigned.get(worker)
            under_way += done if item is not None and self.tasks[item].item.rank == rank else 0
        self.watch(
            Progress(
                phase=PHASES[rank],
                done=min(self._done[rank] + under_way, self._size[rank]),
                total=self._size[rank],
                workers=tuple(workers),
            )
        )

"""What 10,000 shards and 1,000 workers cost the driver, without Ray: schedule and loop alone.

    python benchmarks/schedule.py

A stand-in for the pool lets workers finish, fail, vanish and drain, on a clock of its own that
stands still while the driver thinks. Counted is the CPU time that the driver takes meanwhile: the
schedule, the loop, the progress file that it writes each second. What Ray adds to it, ``pool.py``
measures.
"""

from __future__ import annotations

import argparse
import contextlib
import heapq
import random
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import machine
from report import Page

from actors.events import (
    Event,
    ItemDone,
    ItemFailed,
    WorkerDraining,
    WorkerLost,
    WorkerReady,
    WorkerStartFailed,
)
from actors.pool import WorkerOptions
from cluster import loop as loop_module
from cluster.backlog import Item
from cluster.crew import WorkerKind
from cluster.loop import Loop
from cluster.tasks import MERGING, VERIFYING, Task
from cluster.timing import Timing
from cluster.workers import Fleet
from merge_core.history import recorded
from merge_core.lease import Lease
from merge_core.stores.location import locate

SIZE = 2_000_000_000
SECONDS = {MERGING: 4.0, VERIFYING: 2.0}
"""Of a shard on a worker with 0.5 GB/s: a merge of 10,000 takes a minute on 1,000 of them."""

STRETCHES = (1, 10)
"""Times that: what the driver does once a second weighs more in a long merge."""

FAILS, VANISHES, CANNOT_START, DRAINS = 0.02, 0.01, 0.02, 0.001
"""How many of all attempts, starts, and of all workers in any second."""


class StandIn:
    """Answers as the pool does; ``now`` is its clock, ``spent`` what it takes itself."""

    def __init__(self, seed: int, stretch: int) -> None:
        self.now, self.spent = 0.0, 0.0
        self.greetings: dict[int, str] = {}
        self.assigned: dict[int, int] = {}
        self.events: Counter[str] = Counter()
        self._alive: set[int] = set()
        self._draining: dict[int, float] = {}
        self._failed: set[int] = set()
        self._due: list[tuple[float, int, Any]] = []
        self._chance = random.Random(seed)
        self._stretch = stretch
        self.tasks: list[Task] = []

    def monotonic(self) -> float:
        """The clock, for the loop."""
        return self.now

    def start(self, worker: int, _kind: str, delay: float) -> None:
        """One that comes up in some seconds, or does not."""
        with self._counted():
            self._alive.add(worker)
            fails = self._chance.random() < CANNOT_START
            event = (
                WorkerStartFailed(worker=worker, reason="no")
                if fails
                else WorkerReady(worker=worker)
            )
            self._after(delay + self._chance.uniform(3, 9), worker, event)

    def assign(self, worker: int, item: int, *_: Any) -> None:
        """Decide how that will end, and when."""
        with self._counted():
            self.assigned[worker] = item
            seconds = SECONDS[self.tasks[item].item.rank] * self._chance.uniform(0.8, 1.3)
            seconds *= self._stretch
            event: Event = ItemDone(worker=worker, item=item)
            lot = self._chance.random()
            if lot < VANISHES:
                event = WorkerLost(worker=worker, reason="its node is gone")
            elif lot < VANISHES + FAILS and item not in self._failed:  # three end a merge
                self._failed.add(item)
                event = ItemFailed(worker=worker, item=item, error=RuntimeError("a bad read"))
            self._after(seconds, worker, event)

    def next_events(self, timeout: float) -> list[Event]:
        """Go on to the next thing that happens."""
        with self._counted():
            until = self.now + timeout
            self.now = min(until, self._due[0][0]) if self._due else until
            found = []
            while self._due and self._due[0][0] <= self.now:
                _, worker, event = heapq.heappop(self._due)
                if worker in self._alive:
                    found.append(self._told(worker, event))
            return found

    def draining(self) -> list[WorkerDraining]:
        """Nodes that go, some of them new."""
        with self._counted():
            for worker in [w for w in self.greetings if self._chance.random() < DRAINS]:
                self._draining.setdefault(worker, self.now + self._chance.uniform(2, 30))
            return [
                WorkerDraining(worker=worker, seconds_left=end - self.now)
                for worker, end in self._draining.items()
                if worker in self._alive
            ]

    def count(self, _kind: str) -> tuple[int, int]:
        """Workers that are up, and that come."""
        return len(self.greetings), len(self._alive) - len(self.greetings)

    def status(self) -> dict[int, tuple[str, str, int, int]]:
        """All answer."""
        with self._counted():
            return dict.fromkeys(self.greetings, ("cpu on a-host", "merging", 1_000, SIZE))

    def release(self, worker: int) -> None:
        """Nothing is heard of it any more."""
        self._alive.discard(worker)
        self.greetings.pop(worker, None)
        self.assigned.pop(worker, None)

    def _told(self, worker: int, event: Event) -> Event:
        self.events[type(event).__name__] += 1
        self.assigned.pop(worker, None)
        if isinstance(event, WorkerReady):
            self.greetings[worker] = "8 lanes"
        if isinstance(event, WorkerLost | WorkerStartFailed):
            self.release(worker)
        return event

    def _after(self, seconds: float, worker: int, event: Event) -> None:
        heapq.heappush(self._due, (self.now + seconds, worker, event))

    @contextlib.contextmanager
    def _counted(self) -> Iterator[None]:
        clock = time.process_time()
        try:
            yield
        finally:
            self.spent += time.process_time() - clock


def run(shards: int, workers: int, stretch: int, out: Path) -> dict[str, Any]:
    """Seconds of the driver and of the merge, and what happened."""
    pool, said, place = StandIn(0, stretch), 0, locate(out)

    def say(_line: str) -> None:
        nonlocal said
        said += 1

    def settle(event: ItemDone) -> ItemDone:
        if loop.tasks[event.item].item.rank == MERGING:
            loop.add([_task(event.item, VERIFYING, "check")])
        return event

    kinds = (WorkerKind(name="cpu", most=workers, ceiling=workers),)
    fleet = Fleet(workers=(WorkerOptions(device="cpu", resources={"num_cpus": 4}),), kinds=kinds)
    with (
        mock.patch.object(loop_module, "time", pool),
        Lease(place, say) as lease,
        recorded(place, lease.holder, {}, _ignore, say) as history,
    ):
        timing = Timing(history.attempt)
        loop = Loop(pool, fleet, 1800.0, settle, history.say, history.watch, timing)  # type: ignore[arg-type]
        pool.tasks = loop.tasks
        clock = time.process_time()
        loop.add([_task(n, MERGING, "merge") for n in range(shards)])
        loop.run()
        spent = time.process_time() - clock - pool.spent
    assert pool.events["ItemDone"] >= 2 * shards
    return {
        "driver": spent,
        "merge": pool.now,
        "decisions": said,
        "events": dict(sorted(pool.events.items())),
    }


def _task(number: int, rank: int, method: str) -> Task:
    item = Item(size=SIZE - number, rank=rank, read_ahead=True)
    return Task(name=f"model-{number:05}.safetensors", item=item, method=method, argument=number)


def _ignore(_progress: object) -> None:
    """Nobody watches."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shards", type=int, default=10_000)
    parser.add_argument("--workers", type=int, default=1_000)
    parser.add_argument("--results", action="store_true", help="write to benchmarks/results")
    options = parser.parse_args()
    runs = {}
    for stretch in STRETCHES:
        with tempfile.TemporaryDirectory() as scratch:
            (Path(scratch) / ".raymeld").mkdir()
            runs[f"x {stretch}"] = run(options.shards, options.workers, stretch, Path(scratch))
    table = [
        "| shards | workers | seconds of the merge | CPU of the driver, s | ms a shard |",
        "|--:|--:|--:|--:|--:|",
        *(
            f"| {options.shards} | {options.workers} | {one['merge']:.0f} | {one['driver']:.2f}"
            f" | {1e3 * one['driver'] / options.shards:.3f} |"
            for one in runs.values()
        ),
    ]
    notes = [
        "each shard is merged and checked; the pool is a stand-in, its own time is left out",
        *(f"{one['decisions']} decisions; events: {one['events']}" for one in runs.values()),
    ]
    facts = machine.describe(Path(tempfile.gettempdir()))
    page = Page(title="What scheduling costs", machine=facts, table=table, notes=notes, runs=runs)
    page.show(keep_as="schedule" if options.results else None)


if __name__ == "__main__":
    main()

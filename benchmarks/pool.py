"""What Ray costs the driver a second and an item: a real pool of workers that do nothing.

    python benchmarks/pool.py --workers 40

Everything here grows with the number of workers, so that it can be told for a thousand.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import machine
from report import Page

from actors.checker import Checker
from actors.events import ItemDone, WorkerReady
from actors.identity import identify
from actors.pool import Pool, WorkerOptions
from cluster.session import LOCAL, session

ITEMS = 500
LOOKS = 20


class Idler(Checker):
    """Does nothing, at once."""

    def idle(self, _nothing: int) -> None:
        """Nothing."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", type=int, default=40)
    parser.add_argument("--results", action="store_true", help="write to benchmarks/results")
    options = parser.parse_args()
    workers = options.workers
    with session(LOCAL, use_gpus=False):
        kind = WorkerOptions(device="cpu", resources={"num_cpus": 0.001, "num_gpus": 0})
        pool = Pool(identify(), [kind], Idler)
        try:
            for worker in range(workers):
                pool.start(worker, "cpu", 0)
            up: list[Any] = []
            while len(up) < workers:
                up += [e for e in pool.next_events(0.25) if isinstance(e, WorkerReady)]
            found = {
                "status of all, once a second": _milliseconds(pool.status),
                "draining nodes, once a second": _milliseconds(pool.draining),
                "an item, given out and heard of": _items(pool, workers),
            }
        finally:
            pool.close()
    table = [f"| {workers} workers | ms of the driver |", "|---|--:|"]
    table += [f"| {name} | {spent:.2f} |" for name, spent in found.items()]
    facts = machine.describe(Path.cwd())
    page = Page(title="What Ray costs the driver", machine=facts, table=table, runs=found)
    page.show(keep_as="pool" if options.results else None)


def _milliseconds(work: Callable[[], object]) -> float:
    clock = time.process_time()
    for _ in range(LOOKS):
        work()
    return (time.process_time() - clock) / LOOKS * 1e3


def _items(pool: Pool, workers: int) -> float:
    """While all workers are at something, as they are in a merge."""
    clock, done = time.process_time(), 0
    for worker in range(workers):
        pool.assign(worker, worker, "idle", 0)
    while done < ITEMS:
        for event in pool.next_events(0.25):
            assert isinstance(event, ItemDone)
            done += 1
            pool.assign(event.worker, done, "idle", 0)
    return (time.process_time() - clock) / done * 1e3


if __name__ == "__main__":
    main()

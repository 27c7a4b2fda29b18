"""When workers began and ended what they are at: what of that no receipt tells goes to history."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from actors.events import Event, ItemDone, ItemFailed, WorkerLost, WorkerReady
from cluster.tasks import MERGING, PHASES, Task
from merge_core.history import Attempt


@dataclass(slots=True)
class Timing:
    """Times every attempt.

    Args:
        note: called with each that left no receipt.
    """

    note: Callable[[Attempt], None]
    _hosts: dict[int, str] = field(default_factory=dict)
    _at: dict[int, tuple[Task, float]] = field(default_factory=dict)
    """What each worker is at, and since when."""

    def begin(self, worker: int, task: Task) -> None:
        """A worker was given a task."""
        self._at[worker] = task, time.time()

    def handle(self, event: Event) -> None:
        """Take note of what ended an attempt, if it is such an event."""
        match event:
            case WorkerReady(worker=worker, host=host):
                self._hosts[worker] = host
            case ItemDone(worker=worker):
                self._end(worker, "done")
            case ItemFailed(worker=worker, error=error):
                self._end(worker, "failed", str(error))
            case WorkerLost(worker=worker, reason=reason):
                self._end(worker, "lost", reason)
            case _:
                pass

    def release(self, worker: int) -> None:
        """A worker is let go, whatever it is at."""
        self._end(worker, "released")

    def _end(self, worker: int, outcome: str, why: str = "") -> None:
        task, began = self._at.pop(worker, (None, 0.0))
        if task is None or (outcome == "done" and task.item.rank == MERGING):
            return
        self.note(
            Attempt(
                worker=f"worker-{worker}",
                host=self._hosts.get(worker, ""),
                phase=PHASES[task.item.rank],
                task=task.name,
                began=began,
                ended=time.time(),
                outcome=outcome,
                why=why,
            )
        )

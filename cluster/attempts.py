"""The attempts of one item: who is at it, what went wrong so far, and whether it is tried again."""

from __future__ import annotations

from dataclasses import dataclass, field

from actors.events import ItemFailed, WorkerLost
from cluster.policies import MAX_ERRORS, MAX_LOSSES, Decision, try_again
from merge_core.errors import DeviceMemoryError


@dataclass(slots=True)
class Attempts:
    """What became of an item so far."""

    begun: int = 0
    errors: int = 0
    losses: int = 0
    shrink: int = 0
    """How often it ran out of memory."""
    avoid: int | None = None
    """The worker that it last failed on, or straggles on: another one gets it, if there is one."""
    workers: set[int] = field(default_factory=set)
    """Who is at it; two of them while a straggler has company."""

    def begin(self, worker: int) -> None:
        """Note one more attempt."""
        self.begun += 1
        self.workers.add(worker)

    def lost(self, event: WorkerLost) -> Decision:
        """Whether it is tried again after its worker died."""
        self.avoid = event.worker
        if event.out_of_memory:
            self.shrink += 1
            return self._error(event.reason)
        self.losses += 1
        return try_again(self.losses, MAX_LOSSES, event.worker, event.reason)

    def failed(self, event: ItemFailed) -> Decision:
        """Whether it is tried again after an error."""
        if event.hopeless:
            return Decision(yes=False, reason=str(event.error))
        self.avoid = event.worker
        self.shrink += isinstance(event.error, DeviceMemoryError)
        return self._error(str(event.error))

    def _error(self, reason: str) -> Decision:
        self.errors += 1
        return try_again(self.errors, MAX_ERRORS, self.avoid, reason)

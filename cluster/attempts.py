"""The attempts of one item: who is at it, what went wrong so far, and whether it is tried again."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from actors.events import ItemFailed, WorkerLost
from cluster.policies import MAX_ERRORS, MAX_LOSSES, Decision, try_again
from merge_core.errors import DeviceMemoryError


@dataclass(frozen=True, slots=True)
class Place:
    """A worker, and its node."""

    worker: int
    node: str


@dataclass(slots=True)
class Attempts:
    """What became of an item so far."""

    begun: int = 0
    errors: int = 0
    losses: int = 0
    shrink: int = 0
    """How often it ran out of memory."""
    tried: list[Place] = field(default_factory=list)
    """Where it failed, or straggles: it goes elsewhere, if there is anybody."""
    workers: set[int] = field(default_factory=set)
    """Who is at it; two of them while a straggler has company."""

    def begin(self, worker: int) -> None:
        """Note one more attempt."""
        self.begun += 1
        self.workers.add(worker)

    def lost(self, event: WorkerLost, place: Place) -> Decision:
        """Whether it is tried again after its worker died."""
        self.tried.append(place)
        if event.out_of_memory:
            self.shrink += 1
            return self._error(event.worker, event.reason)
        self.losses += 1
        return try_again(self.losses, MAX_LOSSES, event.worker, event.reason)

    def failed(self, event: ItemFailed, place: Place) -> Decision:
        """Whether it is tried again after an error."""
        if event.hopeless:
            return Decision(yes=False, reason=str(event.error))
        self.tried.append(place)
        self.shrink += isinstance(event.error, DeviceMemoryError)
        return self._error(event.worker, str(event.error))

    def suits(self, place: Place, others: Collection[Place]) -> bool:
        """Whether the item goes to a worker next, of all those that are up.

        A node that nothing failed on comes first, since a bad mount or driver is bad for all of its
        workers, and they fail fast enough to use up every attempt; then a worker that did not fail,
        then one that was not the last to.
        """
        nodes, workers = {one.node for one in self.tried}, {one.worker for one in self.tried}
        last = self.tried[-1].worker if self.tried else None
        for better in (
            lambda one: one.node not in nodes,
            lambda one: one.worker not in workers,
            lambda one: one.worker != last,
        ):
            if better(place):
                return True
            if any(map(better, others)):
                return False
        return True

    def _error(self, worker: int, reason: str) -> Decision:
        self.errors += 1
        return try_again(self.errors, MAX_ERRORS, worker, reason)

"""Tasks: what an item of the schedule means to a worker."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cluster.backlog import Item
from cluster.commands import Assign
from merge_core.errors import StorageError
from merge_core.plan import Shard
from merge_core.stores.opening import parted
from merge_core.verify import FileCheck

PHASES = ("proving", "merging", "verifying")
"""Ranks of the items: first what an earlier run did, so that what fails its proof is merged with
the rest; checks last, when no shard waits."""

RESULTS = ("proven", "merged", "verified")
"""What an item of each rank is counted as when it ended well."""

PROVING, MERGING, VERIFYING = range(3)


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One call of a worker."""

    name: str
    item: Item
    method: str
    """Of the actor; called with ``argument``."""
    argument: Any

    def arguments(self, assign: Assign, then: Task | None) -> tuple[Any, ...]:
        """What the method is called with.

        Args:
            then: the task of ``assign.then``.
        """
        if self.method != "merge":
            return (self.argument,)
        following = then.argument if then is not None else None
        return (self.argument, assign.attempt, assign.shrink, following)


def merging(shard: Shard, *, read_ahead: bool) -> Task:
    """Have a shard merged, see ``Item``."""
    item = Item(size=shard.size, rank=MERGING, device=shard.device, read_ahead=read_ahead)
    return Task(name=shard.name, item=item, method="merge", argument=shard.index)


def checking(check: FileCheck, size: int, rank: int) -> Task:
    """Have a file of the result checked; ``size`` is its own, in bytes."""
    name = f"check of {check.file.name}"
    item = Item(size=size, rank=rank)
    return Task(name=name, item=item, method="check", argument=check)


def size_of(check: FileCheck) -> int:
    """Bytes of its file; what cannot be looked at is for the check itself to report."""
    try:
        store, name = parted(check.file)
        return store.look(name).size
    except StorageError:
        return 0

"""Shards that repeat a file of the base in the same S3: the server copies them within itself.

Nothing changes in them, and the base cuts its files as the merge does: raymeld wrote it. A worker
reads them all the same, for the digests of their tensors; it does not send them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from merge_core.digest import bytes_digest
from merge_core.errors import NotCopiedError, counted
from merge_core.plan import MergePlan, Shard
from merge_core.stores.location import Location
from merge_core.stores.opening import open_hub_out, open_store
from merge_core.stores.store import FileIdentity, PartWriter


def copied_file(plan: MergePlan, shard: Shard, out: Location) -> FileIdentity | None:
    """The file of the base that the store of ``out`` can copy to make ``shard``, if there is one.

    Headers tell: the same one before the same tensors, all of them taken as they are.
    """
    sources = {task.source.file for task in shard.tasks}
    if not _is_same_s3(plan.base, out) or len(sources) != 1:
        return None
    (number,) = sources
    if number is None or plan.base_files[number].size != shard.size:
        return None
    unchanged = all(task.as_bytes and task.source.tensor == task.target for task in shard.tasks)
    same = bytes_digest(shard.layout().header) == plan.header_digests[number]
    return plan.base_files[number] if unchanged and same else None


def copy_notes(plan: MergePlan, out: Location) -> Iterator[str]:
    """What is to be said of them before a merge."""
    found = [shard for shard in plan.shards if copied_file(plan, shard, out) is not None]
    if found:
        size, shards = sum(shard.size for shard in found), counted(len(plan.shards), "shard")
        what = f"{len(found)} of {shards} ({size / 1e9:,.1f} GB) lie unchanged in {plan.base}"
        yield f"{what}: S3 copies them within itself, and they are not uploaded"


@dataclass(slots=True)
class PartStarter:
    """Begins the parts of one worker."""

    plan: MergePlan
    out: Location
    say: Callable[[str], None] | None = None
    """Told what is waited for, where parts wait for room."""
    refusal: str = ""
    """Why the server copies nothing; empty: nothing is known against it."""

    def start(self, shard: Shard, attempt: str) -> PartWriter:
        """Begin a part that may become ``shard``, see ``Store.start``.

        Raises:
            StorageError: a file that was to be copied changed since the plan was made.
        """
        file = None if self.refusal else copied_file(self.plan, shard, self.out)
        if file is not None:
            from merge_core.stores.s3 import S3Store

            try:
                return S3Store(self.out).copy(self.plan.base, file, shard.name, attempt)
            except NotCopiedError as error:
                self.refusal = f"{error.what}: shards in which nothing changes are uploaded too"
        if self.out.upload is not None:
            hub = open_hub_out(self.out)
            return hub.start(shard.name, shard.size, attempt, self.say)
        return open_store(self.out).start(shard.name, shard.size, attempt)


def _is_same_s3(one: Location, other: Location) -> bool:
    return one.scheme == other.scheme == "s3" and one.access == other.access

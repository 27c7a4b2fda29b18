"""The actor that merges: one device, one shard at a time."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

from actors.identity import Identity, identify
from merge_core.ledger import Receipt
from merge_core.plan import MergePlan
from merge_core.verify import FileCheck, FileResult, check_file

if TYPE_CHECKING:
    from merge_core.worker import ShardWorker


class Merger:
    """A worker of one merge. Plain class: ``remote_merger`` makes an actor of it."""

    def __init__(self, plan: MergePlan, out: Path, device: str, name: str) -> None:
        self._plan, self._out, self._device, self._name = plan, out, device, name
        self._worker: ShardWorker | None = None
        self._doing, self._done, self._size = "starting", 0, 0

    def hello(self) -> tuple[Identity, str, str]:
        """Who this is, what lanes it chose and why, and its node. Imports torch; takes seconds.

        The import waits until here because Ray has set CUDA_VISIBLE_DEVICES by now, and torch
        remembers what it saw first.
        """
        identity = identify()
        from merge_core.worker import ShardWorker

        self._worker = ShardWorker(self._plan, self._out, self._device, self._name)
        self._doing = "idle"
        return identity, self._worker.choice.reason, ray.get_runtime_context().get_node_id()

    def merge(self, shard: int, attempt: int) -> Receipt:
        """Merge a shard into a part; see ``ShardWorker.merge``."""
        if self._worker is None:
            raise RuntimeError("hello() comes first")
        self._begin(self._plan.shards[shard].name, self._plan.shards[shard].size)
        try:
            return self._worker.merge(shard, attempt, self._note)
        finally:
            self._begin("idle", 0)

    def check(self, check: FileCheck) -> FileResult:
        """Verify one file of the result."""
        self._begin(f"reading back {Path(check.path).name}", 0)
        try:
            return check_file(check)
        finally:
            self._begin("idle", 0)

    @ray.method(concurrency_group="control")  # type: ignore[untyped-decorator]
    def status(self) -> tuple[str, str, int, int]:
        """Device, doing what, bytes done, bytes of that; answers while ``merge`` runs."""
        return f"{self._device} on {socket.gethostname()}", self._doing, self._done, self._size

    def _begin(self, doing: str, size: int) -> None:
        self._doing, self._done, self._size = doing, 0, size

    def _note(self, done: int) -> None:
        self._done = done


def remote_merger(cls: type[Merger], **options: Any) -> Any:
    """``cls`` as an actor class that Ray neither restarts nor retries: the schedule decides."""
    return ray.remote(
        concurrency_groups={"control": 1}, max_restarts=0, max_task_retries=0, **options
    )(cls)

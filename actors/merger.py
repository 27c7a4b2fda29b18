"""The actor that merges: one device, one shard at a time."""

from __future__ import annotations

import logging
from functools import partial
from typing import TYPE_CHECKING

from actors.checker import Checker
from actors.greeting import greet
from actors.identity import Signed
from merge_core.ledger import Receipt
from merge_core.output import check_prepared
from merge_core.plan import MergePlan
from merge_core.stores.location import Location
from merge_core.upload import check_scratch

if TYPE_CHECKING:
    from merge_core.worker import ShardWorker

_log = logging.getLogger(__name__)


class Merger(Checker):
    """A worker of one merge; it checks as well what was merged."""

    def __init__(self, device: str, name: str, plan: MergePlan, out: Location) -> None:
        super().__init__(device, name)
        self._plan, self._out = plan, out
        self._worker: ShardWorker | None = None

    def hello(self) -> Signed:
        """Who this is, and what lanes it chose and why: a ``Greeting``. Takes seconds, for torch.

        The import waits until here because Ray has set CUDA_VISIBLE_DEVICES by now, and torch
        remembers what it saw first.

        Raises:
            DeviceMemoryError: not even one lane fits here.
            StorageError: an input or OUT is another one here than for the driver, or the scratch
                cannot be written to.
        """
        from merge_core.worker import ShardWorker

        check_prepared(self._out, self._plan)
        self._worker = ShardWorker(self._plan, self._out, self._device, self._name, say=self._wait)
        self._begin("idle", 0)
        worker = self._worker
        choice = "; ".join(filter(None, (worker.choice.reason, check_scratch(self._out))))
        return greet(worker.describe_device(), worker.found, choice)

    def merge(self, shard: int, attempt: int, shrink: int, then: int | None) -> Receipt:
        """Merge a shard into a part; see ``ShardWorker.merge``."""
        if self._worker is None:
            raise RuntimeError("hello() comes first")
        name, size = self._plan.shards[shard].name, self._plan.shards[shard].size
        self._begin(name, size)
        try:
            receipt = self._worker.merge(shard, attempt, partial(self._note, name), shrink, then)
        finally:
            self._begin("idle", 0)
        said = {"out": str(self._out), "done": receipt.size, "seconds": receipt.seconds}
        _log.info("merged %s", name, extra={"phase": "merging", **said})
        return receipt

    def _note(self, name: str, done: int) -> None:
        self._doing, self._done = name, done

    def _wait(self, what: str) -> None:
        self._doing = what
        _log.info("%s", what, extra={"phase": "merging", "out": str(self._out)})

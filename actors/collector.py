"""The actor that collects: it alone publishes shards and writes the record."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from merge_core.commit import Assembly
from merge_core.ledger import Receipt
from merge_core.plan import MergePlan
from merge_core.stores.location import Location
from merge_core.verify import FileCheck


class Collector:
    """An ``Assembly`` in a process of its own; a replacement rebuilds itself from the receipts."""

    def __init__(self, plan: MergePlan, out: Location, run: str) -> None:
        self._plan, self._out, self._run = plan, out, run
        self._opened: Assembly | None = None

    @property
    def _assembly(self) -> Assembly:
        """Opened by the first call: what goes wrong then reaches the driver in full, while an
        error in an actor's constructor arrives as "the actor died".
        """
        if self._opened is None:
            self._opened = Assembly(self._plan, self._out, self._run)
        return self._opened

    def resume(self) -> dict[int, FileCheck]:
        """See ``Assembly.resume``."""
        return self._assembly.resume()

    def forget(self, index: int) -> None:
        """See ``Assembly.forget``."""
        self._assembly.forget(index)

    def receipts(self) -> dict[int, Receipt]:
        """See ``Assembly.receipts``."""
        return self._assembly.receipts

    def accept(self, receipt: Receipt) -> bool:
        """See ``Assembly.accept``."""
        return self._assembly.accept(receipt)

    def write_record(self) -> None:
        """See ``Assembly.write_record``."""
        self._assembly.write_record()

    def publish(self, verified: Mapping[str, Any]) -> None:
        """See ``Assembly.publish``."""
        self._assembly.publish(verified)

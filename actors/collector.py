"""The actor that collects: it alone publishes shards and writes the record."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from merge_core.commit import Assembly
from merge_core.ledger import Receipt
from merge_core.plan import MergePlan


class Collector:
    """An ``Assembly`` in a process of its own; a replacement rebuilds itself from the receipts."""

    def __init__(self, plan: MergePlan, out: Path) -> None:
        self._plan, self._out = plan, out
        self._opened: Assembly | None = None

    @property
    def _assembly(self) -> Assembly:
        """Opened by the first call: what goes wrong then reaches the driver in full, while an
        error in an actor's constructor arrives as "the actor died".
        """
        if self._opened is None:
            self._opened = Assembly(self._plan, self._out)
        return self._opened

    def accept(self, receipt: Receipt) -> bool:
        """See ``Assembly.accept``."""
        return self._assembly.accept(receipt)

    def write_record(self) -> None:
        """See ``Assembly.write_record``."""
        self._assembly.write_record()

    def publish(self, verified: Mapping[str, Any]) -> None:
        """See ``Assembly.publish``."""
        self._assembly.publish(verified)

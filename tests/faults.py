"""Workers and collectors that fail in a chosen way at a chosen moment, for real.

Ray ships them to its workers by value (see ``by_value``), since tests are not installed.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

from actors.collector import Collector
from actors.identity import Identity
from actors.merger import Merger
from merge_core.errors import DeviceMemoryError
from merge_core.ledger import Receipt


class KilledInFirstAttempt(Merger):
    """SIGKILLs its own process while it merges shard 1 for the first time."""

    def merge(self, shard: int, attempt: int) -> Receipt:
        self._dying = shard == 1 and attempt == 1
        return super().merge(shard, attempt)

    def _note(self, done: int) -> None:
        super()._note(done)
        if self._dying:
            os.kill(os.getpid(), signal.SIGKILL)


class FailsTwice(Merger):
    """Raises in the first two attempts of shard 1, once out of memory."""

    def merge(self, shard: int, attempt: int) -> Receipt:
        if shard == 1 and attempt == 1:
            raise DeviceMemoryError("no room", "cpu")
        if shard == 1 and attempt == 2:
            raise RuntimeError("a bug")
        return super().merge(shard, attempt)


class Poisoned(Merger):
    """Raises in every attempt of shard 1."""

    def merge(self, shard: int, attempt: int) -> Receipt:
        if shard == 1:
            raise RuntimeError("poison")
        return super().merge(shard, attempt)


class CannotStart(Merger):
    """Never comes up."""

    def hello(self) -> tuple[Identity, str]:
        raise RuntimeError("no driver for this device")


class LiesAboutItsWork(Merger):
    """Claims to have merged another plan, in the first attempt of shard 0."""

    def merge(self, shard: int, attempt: int) -> Receipt:
        import dataclasses

        receipt = super().merge(shard, attempt)
        if shard == 0 and attempt == 1:
            return dataclasses.replace(receipt, fingerprint="0" * 64)
        return receipt


class CollectorKilledOnce(Collector):
    """SIGKILLs its own process after it has accepted shard 0, before it can say so."""

    def accept(self, receipt: Receipt) -> bool:
        accepted = super().accept(receipt)
        mark = Path(self._out) / ".raymeld" / "killed"
        if receipt.shard == 0 and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return accepted


def by_value() -> None:
    """Have Ray send this module's classes along instead of their names."""
    import faults
    import ray

    ray.cloudpickle.register_pickle_by_value(faults)

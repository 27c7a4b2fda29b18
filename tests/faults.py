"""Workers and collectors that fail in a chosen way at a chosen moment, for real.

Ray ships them to its workers by value (see ``by_value``), since tests are not installed.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import kills
import leases
from kills import drain
from leases import take_over

from actors.collector import Collector
from actors.identity import Signed
from actors.merger import Merger
from merge_core.errors import DeviceMemoryError
from merge_core.ledger import Receipt
from merge_core.storage import write_durably

EATS_AT_MOST = 8 << 30
"""Bytes, for the case that Ray's monitor does not work."""


class FailsTwice(Merger):
    """Raises in the first two attempts of shard 1, once out of memory."""

    def merge(self, shard: int, attempt: int, shrink: int, then: int | None) -> Receipt:
        if shard == 1 and attempt == 1:
            raise DeviceMemoryError("no room", "cpu")
        if shard == 1 and attempt == 2:
            raise RuntimeError("a bug")
        return super().merge(shard, attempt, shrink, then)


class Poisoned(Merger):
    """Raises in every attempt of shard 1."""

    def merge(self, shard: int, attempt: int, shrink: int, then: int | None) -> Receipt:
        if shard == 1:
            raise RuntimeError("poison")
        return super().merge(shard, attempt, shrink, then)


class Hangs(Merger):
    """Goes no further in its first attempt of shard 0, once it has begun to write."""

    def merge(self, shard: int, attempt: int, shrink: int, then: int | None) -> Receipt:
        self._hanging = shard == 0 and attempt == 1
        if shard == 0 and attempt == 2:  # or the first, which may only be slow, is ended before
            _until(self._out.local.with_name("hangs").exists)
        return super().merge(shard, attempt, shrink, then)

    def _note(self, name: str, done: int) -> None:
        super()._note(name, done)
        if self._hanging:
            write_durably(self._out.local.with_name("hangs"), str(os.getpid()).encode())
            self._hang()

    def _hang(self) -> None:
        threading.Event().wait()


class Stopped(Hangs):
    """Stops its own process there: it answers nothing, and is not dead."""

    def _hang(self) -> None:
        os.kill(os.getpid(), signal.SIGSTOP)


class CannotStart(Merger):
    """Never comes up."""

    def hello(self) -> Signed:
        raise RuntimeError("no driver for this device")


class FullOnce(Merger):
    """Finds next to no memory where the first worker is."""

    def hello(self) -> Signed:
        from merge_core import worker
        from merge_core.memory import Memory

        with contextlib.suppress(FileExistsError):
            self._out.local.with_name("full").touch(exist_ok=False)
            worker.measure_memory = lambda _: Memory(host=1_000_000, device=None)
        return super().hello()


class OnANodeThatGoes(Merger):
    """On the spot node: has it go in the middle of a shard; elsewhere it waits for that."""

    def merge(self, shard: int, attempt: int, shrink: int, then: int | None) -> Receipt:
        mark = self._out.local.with_name("goes")
        if _on_spot_node():
            self._notice()
            mark.touch()
            self._when_noticed()
        else:
            _until(mark.exists)
        return super().merge(shard, attempt, shrink, then)

    def _notice(self) -> None:
        """What befalls the node."""
        raise NotImplementedError

    def _when_noticed(self) -> None:
        """What the worker does after that: its shard would take for ever."""
        threading.Event().wait()


class FinishesInTime(OnANodeThatGoes):
    """Its node goes much later; it waits until the driver knows."""

    def _notice(self) -> None:
        drain(seconds=1000.0)

    def _when_noticed(self) -> None:
        _until_said(self._out.local, "its node is going")


class CannotFinish(OnANodeThatGoes):
    """Its node goes in a moment."""

    def _notice(self) -> None:
        drain(seconds=4.0)


class Terminated(OnANodeThatGoes):
    """SIGTERM to the ``ray start --block`` of its node; how long that waits is told there."""

    def _notice(self) -> None:
        os.kill(_parent(os.getppid()), signal.SIGTERM)


class TerminatedInTime(Terminated, FinishesInTime):
    """The node waits; the shard is finished when the driver knows."""


class OnAStoppedNode(OnANodeThatGoes):
    """Stops the raylet of its node, and finishes its part when somebody else has the shard."""

    def merge(self, shard: int, attempt: int, shrink: int, then: int | None) -> Receipt:
        late = self._out.local.with_name("late")
        if attempt > 1:
            _until(late.exists)
        receipt = super().merge(shard, attempt, shrink, then)
        if _on_spot_node():
            late.write_text(receipt.part)
        return receipt

    def _notice(self) -> None:
        os.kill(os.getppid(), signal.SIGSTOP)

    def _when_noticed(self) -> None:
        _until_said(self._out.local, "after failure 1 of 20")


class EatsMemory(OnANodeThatGoes):
    """Takes memory until Ray kills it, in its first shard on the spot node."""

    def merge(self, shard: int, attempt: int, shrink: int, then: int | None) -> Receipt:
        if self._out.local.with_name("goes").exists():
            return Merger.merge(self, shard, attempt, shrink, then)
        return super().merge(shard, attempt, shrink, then)

    def _notice(self) -> None:
        self._eaten: list[bytes] = []

    def _when_noticed(self) -> None:
        step = 64 << 20
        for _ in range(0, EATS_AT_MOST, step):
            self._eaten.append(b"\1" * step)
        raise RuntimeError("nobody stopped it")


def _parent(process: int) -> int:
    import psutil

    return int(psutil.Process(process).ppid())


class UntilANodeLeft(Merger):
    """Begins when two nodes are up, and ends the last shard when one of them has left."""

    def merge(self, shard: int, attempt: int, shrink: int, then: int | None) -> Receipt:
        both = self._out.local.with_name("both")
        if not both.exists():
            _until(lambda: len(_nodes()) == 2)
            both.write_text(" ".join(_nodes()))
        if shard == len(self._plan.shards) - 1:
            _until(lambda: not _nodes() >= {*both.read_text().split()})
        return super().merge(shard, attempt, shrink, then)


class UntilGivenUp(Merger):
    """Begins when the driver waits no longer for workers of the other kind."""

    def merge(self, shard: int, attempt: int, shrink: int, then: int | None) -> Receipt:
        _until_said(self._out.local, "going on without")
        return super().merge(shard, attempt, shrink, then)


class LosesTheLease(Collector):
    """Another merge takes over before the first part is accepted, and begins a part of its own."""

    def accept(self, receipt: Receipt) -> bool:
        self._successor = take_over(self._out.local)
        state = self._out.local / ".raymeld"
        (state / "progress.json").write_text("the successor's")
        (state / "parts" / "successor.part").touch()
        return super().accept(receipt)


class NeverAnswers(Collector):
    """As if it read from a network file system that is gone."""

    def receipts(self) -> dict[int, Receipt]:
        threading.Event().wait()
        return {}


class TellsItsNode(Collector):
    """Says where it is."""

    def node(self) -> str:
        import ray

        return str(ray.get_runtime_context().get_node_id())


def _nodes() -> set[str]:
    """Those that are up, besides the head."""
    import ray

    alive = (node for node in ray.nodes() if node["Alive"])
    return {node["NodeID"] for node in alive if "node:__internal_head__" not in node["Resources"]}


def _on_spot_node() -> bool:
    import ray

    return bool(ray.get_runtime_context().get_node_labels().get("spot") == "yes")


def _until_said(out: Path, text: str) -> None:
    """Until the driver has said so."""
    path = out / ".raymeld" / "progress.json"
    _until(lambda: path.exists() and text in path.read_text())


def _until(condition: Callable[[], bool]) -> None:
    while not condition():
        threading.Event().wait(0.01)


class StopsAtTheThird(Merger):
    """Never finishes the third shard that it begins."""

    def merge(self, shard: int, attempt: int, shrink: int, then: int | None) -> Receipt:
        self._begun = getattr(self, "_begun", 0) + 1
        if self._begun == 3:
            self._out.local.with_name("stopped").touch()
            threading.Event().wait()
        return super().merge(shard, attempt, shrink, then)


class LiesAboutItsWork(Merger):
    """Claims to have merged another plan, in the first attempt of shard 0."""

    def merge(self, shard: int, attempt: int, shrink: int, then: int | None) -> Receipt:
        import dataclasses

        receipt = super().merge(shard, attempt, shrink, then)
        if shard == 0 and attempt == 1:
            return dataclasses.replace(receipt, fingerprint="0" * 64)
        return receipt


class FailsInEveryWay(LiesAboutItsWork, FailsTwice):
    """Waits until the driver's side says so; then lies, fails twice, and dies over shard 2."""

    def merge(self, shard: int, attempt: int, shrink: int, then: int | None) -> Receipt:
        _until((self._out.local / ".raymeld" / "go").exists)
        if shard == 2 and attempt == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().merge(shard, attempt, shrink, then)


def by_value() -> None:
    """Have Ray send this module's classes along instead of their names."""
    import faults
    import ray

    kills.by_value()
    ray.cloudpickle.register_pickle_by_value(leases)
    ray.cloudpickle.register_pickle_by_value(faults)

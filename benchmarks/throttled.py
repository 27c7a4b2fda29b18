"""Workers whose storage gives and takes no more than so many bytes a second, each way.

Stands in for the network of a node: one worker a node, so its process is the node. What passes is
real, it only waits its turn first.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable
from typing import Any

from actors.identity import Signed
from actors.merger import Merger
from merge_core.storage import PartFile, RangeReader
from merge_core.verify.reading import Reader

LATE_SECONDS = 0.05
"""That a thread which was not woken in time may make up for: a busy machine is not a slow link."""


class Gate:
    """Lets so many bytes a second through, first come, first served. Threads share it."""

    def __init__(self, bandwidth: float) -> None:
        self._bandwidth, self._free = bandwidth, 0.0
        self._lock = threading.Lock()

    def take(self, nbytes: int) -> None:
        """Come back when so many bytes are through."""
        with self._lock:
            earliest = time.monotonic() - LATE_SECONDS
            self._free = max(self._free, earliest) + nbytes / self._bandwidth
            due = self._free
        time.sleep(max(0.0, due - time.monotonic()))


class ThrottledMerger(Merger):
    """Begins when all workers are there: on real nodes none takes the others' CPU to start."""

    bandwidth: float
    workers: int

    def hello(self) -> Signed:
        """Put the gates up, and wait for the others."""
        inwards, outwards = Gate(self.bandwidth), Gate(self.bandwidth)
        _pass(inwards, RangeReader, RangeReader.read_into, lambda _buffer, _offset, nbytes: nbytes)
        _pass(inwards, RangeReader, RangeReader.read, lambda _offset, nbytes: nbytes)
        _pass(inwards, Reader, Reader.read, lambda _start, nbytes, _buffer: nbytes)
        _pass(outwards, PartFile, PartFile.write, lambda data, _offset: len(data))
        answer = super().hello()
        here = self._out.local / ".raymeld" / "up"
        here.mkdir(exist_ok=True)
        (here / self._name).touch()
        while len(list(here.iterdir())) < self.workers:
            time.sleep(0.01)
        return answer


def _pass(gate: Gate, kind: type, method: Callable[..., Any], size: Callable[..., int]) -> None:
    """Have a method of ``kind`` wait at the gate with what it is called with."""

    @functools.wraps(method)
    def throttled(self: Any, *args: Any) -> Any:
        gate.take(size(*args))
        return method(self, *args)

    setattr(kind, method.__name__, throttled)

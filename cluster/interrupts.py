"""Ctrl-C and SIGTERM while a command talks to a cluster: none of them gets lost."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from typing import Any


class Interrupts:
    """Signals that came. The first waits to be heeded; every further one interrupts at once.

    Python's own way, to raise KeyboardInterrupt wherever the program is, loses a few of a hundred
    here: each HTTP request of Ray's client ends in a finalizer of urllib3, and what is raised in a
    finalizer is printed and ignored. Heeded as well as raised, not even those are lost.
    """

    def __init__(self) -> None:
        self._came = self._heeded = 0

    def heed(self) -> None:
        """Called wherever a command waits.

        Raises:
            KeyboardInterrupt: a signal came since the last call.
        """
        if self._came > self._heeded:
            self._heeded = self._came
            raise KeyboardInterrupt

    def note(self, number: int, frame: Any) -> None:
        """Handle a signal."""
        del number, frame
        self._came += 1
        if self._came > 1:  # whoever repeats it does not want to wait for an answer of the cluster
            raise KeyboardInterrupt


@contextlib.contextmanager
def noted_interrupts() -> Iterator[Interrupts]:
    """Note SIGINT and SIGTERM while inside. For the main thread alone, as all handlers are.

    A terminal that is closed (SIGHUP) ends this command and nothing else, least of all a job.
    """
    interrupts = Interrupts()
    before = {n: signal.signal(n, interrupts.note) for n in (signal.SIGINT, signal.SIGTERM)}
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup
        before[signal.SIGHUP] = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        yield interrupts
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

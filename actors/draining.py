"""The nodes that are about to go: drained by hand, by a spot notice, SIGTERM or an autoscaler."""

from __future__ import annotations

import contextlib
import math
import threading
import time

ASK_SECONDS = 0.5
"""Between two questions, each of which the head answers in a millisecond; a spot machine may give
half a minute of notice."""

LAST_ANSWER_SECONDS = 2.0
"""For the answer that is under way when nobody wants it any more."""


class Draining:
    """Asks for them in a thread of its own: a head that died a moment ago would be waited for for a
    minute, and then Ray would end the process.
    """

    def __init__(self) -> None:
        self._deadlines: dict[str, float] = {}
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._ask, name="draining", daemon=True)
        self._thread.start()

    @property
    def seconds_left(self) -> dict[str, float]:
        """By Ray's id of each such node; infinite where no time was said."""
        now = time.time()
        return {node: end - now for node, end in self._deadlines.items()}

    def close(self) -> None:
        """Ask no more."""
        self._closed.set()
        self._thread.join(LAST_ANSWER_SECONDS)

    def _ask(self) -> None:
        while not self._closed.wait(ASK_SECONDS):
            with contextlib.suppress(Exception):  # the driver hears of a dead cluster elsewhere
                self._deadlines = draining_nodes()


def draining_nodes() -> dict[str, float]:
    """When each such node goes, in seconds since the epoch; may wait for the head for a minute."""
    from ray._private.state import state  # what Ray Train asks; there is no public way

    found = state.get_draining_nodes()  # milliseconds, of which 0 means never
    return {node: end / 1000 if end else math.inf for node, end in found.items()}

"""How often, and after which pauses, a broken transfer is tried again."""

from __future__ import annotations

import random
import time

TRIES = 8
"""Of one block. Each asks only for what is left of it, so the last ones are short."""

FIRST_PAUSE = 0.1
"""Seconds at most; then twice as long each time, to some 6 s: longer failures are no hiccups."""


class Retries:
    """Counts the failures of one block. Not shared by threads."""

    def __init__(self) -> None:
        self._failed = 0

    def wait_after(self, error: Exception) -> None:
        """Pause before the next try, or raise ``error`` if that was the last one.

        The pause is random, from none to the most that it may be: what failed together should
        not come back together.
        """
        self._failed += 1
        if self._failed == TRIES:
            raise error
        time.sleep(random.uniform(0, FIRST_PAUSE * 2 ** (self._failed - 1)))

"""How often what may pass by itself is tried again, and how long is waited in between."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Retries:
    """Of one request; the defaults wait some 15 seconds in all, longer where the server asks."""

    attempts: int = 6
    first_pause: float = 0.5
    """Seconds; each pause is twice the one before."""
    longest_pause: float = 20.0
    longest_asked: float = 300.0
    """What a server may ask for: the hub's limits on requests begin anew every five minutes."""

    def pause(self, failed: int, asked: float = 0.0) -> None:
        """Wait after failure number ``failed``, at least for the seconds that were ``asked`` for.

        Between half of the time and all of it, so that clients that failed together do not come
        back together.
        """
        pause = min(self.longest_pause, self.first_pause * 2 ** (failed - 1))
        time.sleep(max(random.uniform(pause / 2, pause), min(asked, self.longest_asked)))


PATIENT = Retries()

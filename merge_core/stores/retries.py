"""How often what may pass by itself is tried again, and how long is waited in between."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Retries:
    """Of one request, or of one block whose transfer breaks off, whatever happens to others."""

    attempts: int
    first_pause: float = 0.5
    """Seconds; each pause is twice the one before."""
    longest_pause: float = 20.0
    longest_asked: float = 300.0
    """What a server may ask for: the hub's limits on requests begin anew every five minutes."""

    def pause(self, failed: int, asked: float = 0.0) -> None:
        """Wait after failure number ``failed``, see ``seconds``."""
        time.sleep(self.seconds(failed, asked))

    def pause_after(self, failed: int, error: Exception) -> None:
        """The same, or raise ``error`` if that was the last attempt."""
        if failed >= self.attempts:
            raise error
        self.pause(failed)

    def seconds(self, failed: int, asked: float = 0.0) -> float:
        """To wait after failure number ``failed``: at least those that were ``asked`` for.

        Between half of the time and all of it, so that clients that failed together do not come
        back together.
        """
        pause = min(self.longest_pause, self.first_pause * 2 ** (failed - 1))
        return max(random.uniform(pause / 2, pause), min(asked, self.longest_asked))


PATIENT = Retries(attempts=6)
"""8 to 15 seconds in all, longer where the server asks."""

STUBBORN = Retries(attempts=10)
"""46 to 92 seconds: an outage of a minute passes."""


def asked_by(headers: Mapping[str, str]) -> float:
    """Seconds after which a server wants to be asked again, by its answer; 0 if it does not say.

    Args:
        headers: by their names in small letters, or by any.
    """
    after = headers.get("retry-after", "")
    return float(after) if after.isdecimal() else 0.0

"""Waiting for workers: what is said meanwhile, and when it ends.

A pending actor is the demand that an autoscaler acts on, so all there is to do is to wait; but
not without a word, and not for ever.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from actors.events import KindUnavailable
from actors.pool import launching
from merge_core.errors import RaymeldError

SAY_SECONDS = 30.0
"""Between two lines about the same waiting; starting Ray and torch takes less."""


@dataclass(slots=True)
class Patience:
    """Counts the time without any worker of a kind.

    Args:
        kind: ``cuda`` or ``cpu``.
        timeout: seconds of it after which nobody waits any more.
        needs: what a worker asks of Ray, such as ``1 GPU``.
        say: called with each line.
    """

    kind: str
    timeout: float
    needs: str
    say: Callable[[str], None]
    launching: Callable[[], str] = launching
    _since: float | None = field(default=None, init=False)
    _said: float = field(default=0.0, init=False)

    def look(self, now: float, up: int, pending: int) -> KindUnavailable | None:
        """Take note of how many workers are up and how many are asked for.

        Args:
            now: by a clock that only runs forward, in seconds.

        Returns:
            The end of it, if none came up for ``timeout`` seconds.
        """
        if up or not pending:
            self._since = None
            return None
        if self._since is None:
            self._since = self._said = now
        if now - self._since >= self.timeout:
            return self._end(pending)
        if now - self._said >= SAY_SECONDS:
            self._said = now
            self.say(self._waiting(pending))
        return None

    def _end(self, pending: int) -> KindUnavailable:
        what = f"no worker came up in {self.timeout:.0f} s: {self._waiting(pending)}"
        remedy = (
            "Free what holds the cluster or let it grow, ask for less, or wait longer with"
            " --start-timeout."
        )
        error = RaymeldError(what, "cluster", remedy)
        return KindUnavailable(kind=self.kind, reason=what, error=error)

    def _waiting(self, pending: int) -> str:
        launches = self.launching()
        return f"waiting for {pending} x {{{self.needs}}}" + (f"; {launches}" if launches else "")

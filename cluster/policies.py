"""What is decided, by numbers alone: each policy returns a decision and its reason."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cluster.crew import Crew

MAX_ERRORS = 3
"""Attempts of an item that may end in an error of ours or out of memory. A third failure on
another worker is no accident."""

MAX_LOSSES = 20
"""Workers that may be lost under one item: spot machines come and go, but an item that kills
every machine it meets must end."""

MAX_START_FAILURES = 3
"""Workers in a row that may fail to start before their kind counts as broken."""

HAND_BACK_SECONDS = 5.0
"""Before its node goes a worker gives back what it has not finished: the end is then known at once,
where a node that vanishes is missed only a quarter of a minute later."""

STRAGGLER_FACTOR = 3.0
"""Times the usual duration after which an item is given to a second worker as well."""

STRAGGLER_SECONDS = 10.0
"""And no sooner than this: a worker for the second copy may have to be started first."""

TIMED_ITEMS = 3
"""Fewer durations than these say nothing about what is usual."""

HUNG_SECONDS, SLOWEST = 600.0, 5e6
"""Where so few are known, an item is given to a second worker after ten minutes, and the time that
its bytes take at 5 MB a second: nobody waits for slower storage than that, but a worker that hangs
with one of the first items would otherwise be waited for for ever."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """Whether to do it, and why."""

    yes: bool
    reason: str


def try_again(count: int, budget: int, worker: int | None, failure: str) -> Decision:
    """Whether an item that failed ``count`` times, now on ``worker``, is tried again."""
    if count >= budget:
        return Decision(yes=False, reason=f"failed {count} times, the last time: {failure}")
    return Decision(
        yes=True, reason=f"after failure {count} of {budget}, on worker-{worker}: {failure}"
    )


def start_again(failures: int, failure: str) -> Decision:
    """Whether another worker is started after so many in a row did not come up."""
    if failures >= MAX_START_FAILURES:
        reason = f"{failures} workers in a row failed to start: {failure}"
        return Decision(yes=False, reason=reason)
    reason = f"{failures} failed of at most {MAX_START_FAILURES} in a row: {failure}"
    return Decision(yes=True, reason=reason)


def hand_back(seconds_left: float) -> Decision:
    """Whether a worker whose node is going gives back its item, or may try to finish it."""
    return Decision(yes=seconds_left <= HAND_BACK_SECONDS, reason="its node is going")


def leave_to_faster(
    cost: int, rank: int, crew: Crew, others: Sequence[Crew], waiting: int
) -> Decision:
    """Whether a worker leaves an item to faster ones, who would be through with all that waits
    before this one was through with it.

    Args:
        cost: of the item, in bytes.
        crew: the worker's.
        others: crews that may do it as well.
        waiting: what waits for the faster ones, this item included, in bytes.
    """
    here = pace_of(crew, rank, others)
    for other in others:
        there = pace_of(other, rank, (crew,))
        hands = other.hands
        if hands and there < here and cost * here > waiting * there / hands:
            reason = f"{other.kind.name} workers would finish it sooner"
            return Decision(yes=True, reason=reason)
    return Decision(yes=False, reason="it helps")


def usual_pace(paces: Sequence[float]) -> float | None:
    """Seconds a byte that items usually take; None while too few are known to tell."""
    return statistics.median(paces) if len(paces) >= TIMED_ITEMS else None


def give_out_again(elapsed: float, cost: int, usual: float | None, fastest: float) -> Decision:
    """Whether an item under way is given to a second worker: the first may never finish.

    Args:
        elapsed: seconds since it was given out.
        cost: of the item, in bytes.
        usual: of all items of its rank so far, see ``usual_pace``.
        fastest: seconds a byte of the workers that could take it.
    """
    if usual is None and elapsed > HUNG_SECONDS + cost / SLOWEST:
        return Decision(yes=True, reason=f"it has taken {elapsed:.0f} s, and may hang")
    if usual is None or elapsed < STRAGGLER_SECONDS:
        return Decision(yes=False, reason="too early to tell")
    seconds = usual * cost
    if elapsed <= STRAGGLER_FACTOR * seconds or elapsed <= fastest * cost:
        return Decision(yes=False, reason="in time")
    reason = f"it has taken {elapsed:.0f} s, where {seconds:.0f} s are usual"
    return Decision(yes=True, reason=reason)


def pace_of(crew: Crew, rank: int, others: Iterable[Crew]) -> float:
    """Seconds a byte that ``crew`` takes: timed, or guessed from how another crew does.

    Before anything was timed only the ratios of these mean something.
    """
    timed = crew.pace(rank)
    if timed is not None:
        return timed
    for other in others:
        timed = other.pace(rank)
        if timed is not None:
            return timed * crew.kind.handicap / other.kind.handicap
    return crew.kind.handicap

"""Several requests to a store at the same time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from threading import Event

from merge_core.background import in_background, leave


def concurrently(work: Callable[[int], None], items: Sequence[int], at_most: int) -> None:
    """Do ``work`` with each of ``items``, with so many of them at the same time.

    Neither Ctrl-C nor the end of Python waits for what is under way, see ``background``.

    Raises:
        Exception: one that ``work`` raised. No item was begun after it, and those that were under
            way have ended.
    """
    left, stopped = iter(items), Event()

    def take() -> None:
        try:
            while not stopped.is_set() and (item := next(left, None)) is not None:
                work(item)
        except BaseException:
            stopped.set()
            raise

    started: list[Future[None]] = []
    try:
        started.extend(in_background(take) for _ in range(min(len(items), at_most)))
        wait(started)
    except BaseException:  # Ctrl-C: theirs are raised below
        stopped.set()
        leave(started)
        raise
    for each in started:
        each.result()

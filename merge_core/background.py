"""Work in a thread that nobody has to wait for."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Future, wait
from threading import Thread
from typing import TypeVar

LEAVE_SECONDS = 3.0
"""Until work is left to itself: a request that is answered takes no longer, and one that is not may
be tried again for minutes."""

_T = TypeVar("_T")


def in_background(work: Callable[[], _T]) -> Future[_T]:
    """What ``work`` will return. Not even Python's end waits for it, as it does for the threads of
    an executor: an access to a mount whose server is gone does not return, and no signal ends it.
    """
    future: Future[_T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # noqa: BLE001 - it is raised where it is waited for
            future.set_exception(error)

    Thread(target=run, daemon=True).start()
    return future


def leave(work: Iterable[Future[_T]]) -> None:
    """Wait for what is still under way when all is over, but not for long."""
    wait(list(work), LEAVE_SECONDS)

"""What a run still writes when it ends, well or not: how far it came, and that OUT is free.

Courtesies: the next run does without them. So nobody waits for a store that is gone while each of
them is tried as often as what a merge cannot do without.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait

from merge_core.background import in_background
from merge_core.stores.location import Access, Location

SECONDS = 10.0
"""For one of them; what comes after one that took longer is not waited for."""

_Store = tuple[str, str, Access]

_under_way: dict[_Store, Future[None]] = {}
"""What was begun last in each store, and not waited for to the end."""

_lock = threading.Lock()


def write_last(where: Location, work: Callable[[], object]) -> None:
    """Have ``work`` done after what was begun so before in that store, and wait, but not for long.

    If that is not enough, the work goes on while this process lives. No failure of a store is an
    error, and Ctrl-C ends the waiting for all of it.

    Args:
        where: any place in the store.
    """
    store = where.scheme, where.root, where.access

    def in_order() -> None:
        if before is not None:
            wait([before])
        with contextlib.suppress(OSError):  # StorageError is one
            work()

    with _lock:
        before = _under_way.get(store)
        given_up = before is not None and not before.done()
        _under_way[store] = done = in_background(in_order)
    with contextlib.suppress(TimeoutError):
        done.result(0 if given_up else SECONDS)
        with _lock:
            if _under_way.get(store) is done:
                del _under_way[store]

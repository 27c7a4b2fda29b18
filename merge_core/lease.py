"""The lease of a destination: one merge at a time works in OUT, and a crash blocks nobody.

A lease is the highest of a row of numbered files, ``OUT/.raymeld/lease/00000007.json``. Taking it
over and keeping it are the same step: create the next number, which only one can, and see that it
is the highest, since who slept for long may find a number free that others have left behind. So it
needs nothing of the store but "create if absent" and a list of names with their times.
"""

from __future__ import annotations

import contextlib
import functools
import os
import secrets
import threading
import time
from collections.abc import Callable
from pathlib import PurePosixPath
from typing import Self

from merge_core.errors import AbsentError, InputError, LeaseLostError, StorageError, refuse
from merge_core.holder import UNKNOWN, Holder, read_holder, write_holder
from merge_core.output import LEASE
from merge_core.stores.last_writes import write_last
from merge_core.stores.location import Location
from merge_core.stores.opening import open_store
from merge_core.stores.store import Store

LEASE_SECONDS = 45.0
"""Age at which a lease that nobody renewed is free. Long enough for a store that stalls, short
enough for a job that is started again on another machine after its first one died."""

RENEW_SECONDS = 10.0
"""Four renewals may fail before anybody else can take over."""

LOOK_SECONDS = 1.0
"""Between two looks at the lease of somebody who may be gone."""

LISTINGS = 5
"""Of the lease's folder, until its last name can be opened: each renewal removes one name, but
not several in a row, and a link that leads nowhere stays."""


class Lease:
    """The lease of one destination, renewed by a thread of its own while it is held.

    Who holds it may have died with its machine. So a lease that nobody renews is waited for: a job
    that is started again at once would otherwise use up its retries.

    Args:
        out: the destination; made if it is missing.
        say: told that the lease is waited for.

    Raises:
        InputError: another merge holds it.
        StorageError: it cannot be written.
    """

    def __init__(self, out: Location, say: Callable[[str], None]) -> None:
        self._out, self._store, self._say = out, open_store(out), say
        self.holder = Holder.this_process()
        self._number = self._take()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep, daemon=True, name="lease")
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def renew(self) -> None:
        """Make it young again.

        Raises:
            LeaseLostError: another merge has taken it.
        """
        if not self._advance(self.holder):
            raise taken_over(self._out)

    def release(self) -> None:
        """Let the next merge take it at once, see ``last_writes``: it also ends by itself."""
        self._ended.set()
        write_last(self._out, self._give_back)

    def _give_back(self) -> None:
        self._thread.join()
        try:
            self._advance(None)
        except StorageError:
            if self._out.is_local:  # on a full disk, times can be changed
                with contextlib.suppress(OSError):
                    os.utime((self._out / _name(self._number)).local, (0, 0))

    def _advance(self, holder: Holder | None) -> bool:
        """Put ``holder`` behind what is ours, see below.

        A store may have done what it did not answer to: then the newest is ours already.
        """
        if not _advance(self._store, self._number, holder):
            number, newest, _ = _newest(self._store)
            if newest is None or newest.run != self.holder.run:
                return False
            if not _advance(self._store, number, holder):
                return False
            self._number = number
        self._number += 1
        return True

    def _take(self) -> int:
        number = self._await_free()
        if not _advance(self._store, number, self.holder):
            raise _held(self._out, _newest(self._store)[1])
        return number + 1

    def _await_free(self) -> int:
        """The number to go on from, once nobody holds the lease."""
        first, holder, age = _latest(self._store, functools.partial(_stamped, self._store))
        if holder is None or not _is_live(holder, age):
            return first
        if holder.is_alive():
            raise _held(self._out, holder)
        left = LEASE_SECONDS - age
        self._say(f"waiting {left:.0f} s for the lease of {holder} to expire")
        end = time.monotonic() + left
        while time.monotonic() < end:
            time.sleep(LOOK_SECONDS)
            number, holder, _ = _newest(self._store)
            if holder is None:
                return number
            if number != first or holder.is_alive():
                raise _held(self._out, holder)
        return first

    def _keep(self) -> None:
        while not self._ended.wait(RENEW_SECONDS):
            try:
                self.renew()
            except StorageError:
                continue  # a full disk or a store that stalls; the next one may pass
            except LeaseLostError:
                return  # whoever publishes next looks at the lease, and stops there


def holder_of(out: Location) -> Holder | None:
    """Who has the lease of ``out``, old or not; None if nobody."""
    return _newest(open_store(out))[1]


def is_held(out: Location, run: str) -> bool:
    """Whether ``run`` has the lease of ``out``, and nobody took it over."""
    holder = holder_of(out)
    return holder is not None and holder.run == run


def live_holder(out: Location) -> Holder | None:
    """Who has it and still renews it, as far as that can be told without writing anything."""
    store = open_store(out)
    _, holder, age = _latest(store, store.clock)
    return holder if holder is not None and _is_live(holder, age) else None


def taken_over(out: Location) -> LeaseLostError:
    """What a merge ends with that lost its lease."""
    return LeaseLostError(
        "another merge has taken OUT over",
        str(out),
        "Let only one run, and give each its own --out.",
    )


def _held(out: Location, holder: Holder | None) -> InputError:
    """The refusal of a second merge."""
    return refuse(
        f"{holder or 'another merge'} is merging into it",
        str(out),
        "Wait for it (raymeld status shows it) or stop it",
    )


def _is_live(holder: Holder, age: float) -> bool:
    return age < LEASE_SECONDS and holder.is_alive() is not False


def _latest(store: Store, clock: Callable[[], float]) -> tuple[int, Holder | None, float]:
    """The highest number, its holder, and the seconds since it was written.

    A file from the future counts as new: clocks were set, and only a renewal would tell more.
    """
    number, holder, written = _newest(store)
    if holder is None or written is None:
        return number, holder, 0.0
    return number, holder, max(0.0, clock() - written)


def _newest(store: Store) -> tuple[int, Holder | None, float | None]:
    """The highest number, its holder, and when it was written, if that can be known."""
    number = 0
    for _ in range(LISTINGS):
        listed = max(store.list(LEASE), key=lambda one: _number(one.name), default=None)
        if listed is None or not _number(listed.name):
            return 0, None, None
        number = _number(listed.name)
        try:
            return number, read_holder(store.get(listed.name)), listed.modified
        except AbsentError:  # renewed in this moment
            continue
    return number, UNKNOWN, None


def _advance(store: Store, number: int, holder: Holder | None) -> bool:
    """Put ``holder`` behind ``number``, unless somebody else is there or further."""
    mine = _name(number + 1)
    if not store.create(mine, write_holder(holder)):
        return False
    names = {listed.name: _number(listed.name) for listed in store.list(LEASE)}
    if max(names.values(), default=0) != number + 1:
        store.delete(mine)
        return False
    for name, older in names.items():
        if 0 < older <= number:
            store.delete(name)
    return True


def _name(number: int) -> str:
    return f"{LEASE}/{number:08}.json"


def _number(name: str) -> int:
    """That of a lease's file; 0 of any other."""
    stem, dot, kind = PurePosixPath(name).name.partition(".")
    return int(stem) if stem.isdecimal() and dot + kind == ".json" else 0


def _stamped(store: Store) -> float:
    """The time by the clock that stamps the files here, which need not be this machine's: that of
    a file which is written now.
    """
    probe = f"{LEASE}/now-{secrets.token_hex(8)}"
    try:
        store.put(probe, b"", durable=False)
        return next(listed.modified for listed in store.list(LEASE) if listed.name == probe)
    except (StorageError, StopIteration):  # a full disk; who takes the lease is told
        return store.clock()
    finally:
        with contextlib.suppress(StorageError):
            store.delete(probe)

"""An object under way where objects are written from their beginning to their end."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import obstore

from merge_core.errors import StorageError
from merge_core.stores.failures import ATTEMPT, incomplete
from merge_core.stores.last_writes import write_last
from merge_core.stores.location import Location
from merge_core.stores.object_errors import reported

WINDOW_BYTES = 64 << 20
"""That may wait for what comes before them: more than lanes are apart, which take cells of 8 MiB in
order; what is further ahead waits in its lane."""

CHUNK_BYTES = 8 << 20
"""Of one request."""

IN_FLIGHT = 4
"""Of them at the same time. With the window they are the memory of a writer: 96 MB."""


class ObjectPartWriter:
    """See ``store.PartWriter``.

    A thread of its own sends what is next; writes wait for it while they are too far ahead, and the
    one that is next never does.

    Args:
        backend: obstore's.
        where: of the part.
    """

    def __init__(self, backend: Any, where: Location, size: int, attempt: str) -> None:
        self._backend, self._where = backend, where
        self._size, self._attempt = size, attempt
        self._ahead: dict[int, bytes] = {}
        self._next = 0
        self._ended = False
        self._error: BaseException | None = None
        self._moved = threading.Condition()
        self._thread = threading.Thread(target=self._send, daemon=True, name="objects-write")
        self._thread.start()

    def write(self, data: memoryview, offset: int) -> None:
        """See ``store.PartWriter``."""
        self.write_small(bytes(data), offset)

    def write_small(self, data: bytes, offset: int) -> None:
        """See ``store.PartWriter``."""
        if not data:
            return
        with self._moved:
            self._moved.wait_for(lambda: self._ended or offset - self._next <= WINDOW_BYTES)
            if self._error is not None:
                raise self._error
            if offset < self._next or offset in self._ahead or offset + len(data) > self._size:
                raise AssertionError(f"{len(data)} bytes at {offset} were written before")
            self._ahead[offset] = data
            self._moved.notify_all()

    def finish(self) -> str:
        """See ``store.PartWriter``."""
        with self._moved:
            end = self._next
            while end in self._ahead:
                end += len(self._ahead[end])
            if self._error is None and end < self._size:
                raise incomplete(self._where, end, self._size)
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._attempt

    def discard(self) -> None:
        """See ``store.PartWriter``."""
        with self._moved:
            self._ended = True
            self._moved.notify_all()
        write_last(self._where, self._remove)  # the next sweep finds it

    def _remove(self) -> None:
        self._thread.join()
        with contextlib.suppress(Exception):
            obstore.delete(self._backend, self._where.path)

    def _send(self) -> None:
        try:
            with reported(self._where):
                obstore.put(
                    self._backend,
                    self._where.path,
                    self._in_order() if self._size else b"",  # no parts would have no metadata
                    attributes={ATTEMPT: self._attempt},
                    chunk_size=CHUNK_BYTES,
                    max_concurrency=IN_FLIGHT,
                )
        except BaseException as error:  # noqa: BLE001 - whoever writes or finishes raises it
            if not self._arrived():
                self._error = error
        finally:
            with self._moved:
                self._ended = True
                self._moved.notify_all()

    def _arrived(self) -> bool:
        """Whether it is there though the store failed: it may be that only its last answer, which
        no second one follows, was lost.
        """
        if self._ended or self._next < self._size:
            return False
        with contextlib.suppress(Exception):
            found = obstore.get(self._backend, self._where.path, options={"head": True})
            mark = found.attributes.get(ATTEMPT)
            return (found.meta["size"], mark) == (self._size, self._attempt)
        return False

    def _in_order(self) -> Iterator[bytes]:
        """What was written, from the beginning to the end; ends the upload when it raises."""
        while self._next < self._size:
            with self._moved:
                self._moved.wait_for(lambda: self._ended or self._next in self._ahead)
                if self._ended:
                    raise StorageError("the part was discarded", str(self._where))
                data = self._ahead.pop(self._next)
                self._next += len(data)
                self._moved.notify_all()
            yield data

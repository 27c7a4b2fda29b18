"""Ranges of a file on the hub, at the commit at which it was pinned.

The hub refers to a signed address for big files. That address serves many ranges, until it
expires; then the hub is asked again.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from huggingface_hub import get_session, hf_hub_url

from merge_core.errors import StorageError
from merge_core.storage import own_memory
from merge_core.stores.blocks import fill_in_blocks
from merge_core.stores.hub_errors import HubPlace
from merge_core.stores.hub_files import HubEntry
from merge_core.stores.hub_requests import (
    PassingError,
    check_status,
    own_headers,
    persistently,
    timeout,
)
from merge_core.stores.retries import Retries

HEAD_BYTES = 100_000
"""Read at once where a small read begins there: it holds the length of a safetensors header and,
nearly always, the header itself, which are asked for one after the other."""

_EXPIRED = frozenset({400, 401, 403, 404, 410})
"""What storage says of an address whose time is over: Amazon, Google and CloudFront differ."""


@dataclass(slots=True)
class _Block:
    """What is still to come of a range."""

    target: memoryview
    offset: int

    def take(self, data: bytes) -> None:
        if len(data) > len(self.target):
            raise PassingError("the answer is longer than the range")
        self.target[: len(data)] = data
        self.target, self.offset = self.target[len(data) :], self.offset + len(data)


class HubReader:
    """One file. Threads may share it, each with its own buffer.

    Args:
        place: the file, at a commit.
        entry: what was pinned.
    """

    def __init__(self, place: HubPlace, entry: HubEntry, retries: Retries) -> None:
        self._place, self._entry, self._retries = place, entry, retries
        self._url = hf_hub_url(place.repo, place.path, revision=place.revision)
        self._signed: str | None = None
        self._head: memoryview | None = None
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"HubReader({str(self._place)!r})"

    def read_into(self, buffer: memoryview, offset: int, nbytes: int) -> memoryview:
        """The ``nbytes`` at ``offset``, as a view inside ``buffer``.

        Raises:
            StorageError: the hub failed however often it was asked, or has another file there.
        """
        self._fill(buffer[:nbytes], offset)
        return buffer[:nbytes]

    def read(self, offset: int, nbytes: int) -> memoryview:
        """The ``nbytes`` at ``offset`` in memory of their own. Raises as ``read_into`` does."""
        buffer = own_memory(nbytes)
        known = self._read_head()[offset : offset + nbytes] if offset < HEAD_BYTES else b""
        buffer[: len(known)] = known
        self._fill(buffer[len(known) :], offset + len(known))
        return buffer

    def close(self) -> None:
        """Nothing to give back: the connections are the session's."""

    def _read_head(self) -> memoryview:
        with self._lock:
            if self._head is None:
                head = memoryview(bytearray(min(HEAD_BYTES, self._entry.size)))
                self._fill(head, 0)
                self._head = head
            return self._head

    def _fill(self, target: memoryview, offset: int) -> None:
        if offset + len(target) > self._entry.size:
            what = f"has {self._entry.size} bytes, and {offset + len(target)} are needed"
            raise StorageError(what, str(self._place), "Plan again")
        if target:
            fill_in_blocks(target, offset, self._fill_block)

    def _fill_block(self, target: memoryview, offset: int) -> None:
        block = _Block(target, offset)  # what an attempt got is not asked for again
        persistently(lambda: self._ask(block), self._place, self._retries)

    def _ask(self, block: _Block) -> None:
        signed = self._signed
        headers = {} if signed else own_headers()
        last = block.offset + len(block.target) - 1
        headers |= {"Range": f"bytes={block.offset}-{last}", "Accept-Encoding": "identity"}
        request = get_session().stream(
            "GET", signed or self._url, headers=headers, timeout=timeout(), follow_redirects=True
        )
        with request as response:
            elsewhere = urlsplit(str(response.url))[:2] != urlsplit(self._url)[:2]
            if elsewhere and response.status_code in _EXPIRED:
                self._signed = None
                raise PassingError("the address that the hub gave has expired")
            check_status(response)
            if not signed:
                self._check_origin(response)
                self._signed = str(response.url) if elsewhere else None
            self._check_range(response, block)
            for data in response.iter_raw():
                block.take(data)
        if block.target:
            raise PassingError("the answer ended early")

    def _check_origin(self, response: Any) -> None:
        """That the hub speaks of the file that was pinned."""
        said = (response.history or [response])[0].headers
        commit = said.get("x-repo-commit")
        linked = said.get("x-linked-etag", "").removeprefix("W/").strip('"')
        pinned = self._entry.oid.removeprefix("sha256:")
        if commit not in (None, self._place.revision) or linked not in ("", pinned):
            what = "the hub has another file there than the one that was planned with"
            raise StorageError(what, str(self._place), "Start again with stable input.")

    def _check_range(self, response: Any, block: _Block) -> None:
        first, count, size = block.offset, len(block.target), self._entry.size
        said = response.headers.get("content-range")
        if response.status_code == 200:  # right only where the whole was asked for
            if count != size or int(response.headers.get("content-length", size)) != size:
                raise PassingError("the answer is the whole file instead of a range")
        elif response.status_code != 206:
            raise PassingError(f"the answer to a range has status {response.status_code}")
        elif said != f"bytes {first}-{first + count - 1}/{size}":
            raise PassingError(f"the answer is another range ({said})")

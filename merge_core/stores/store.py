"""What a merge needs of a place where files lie, whatever keeps them.

Files are published whole or not at all. Big ones are written as parts, which nobody can take for
the file, by workers that may die or be late; who keeps the record publishes the one that it
accepts. Small ones are put, or created where two must not both succeed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

from merge_core.stores.inodes import differ
from merge_core.stores.location import Location

PARTS = ".raymeld/parts"
"""Where parts lie in a store that has no other place for what is not published."""

HUB_RECORD = ".raymeld/hub.json"
"""Where the state of a merge that goes to the hub says to which model, after which commit, and at
last in which."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FileIdentity:
    """What pins a file: if any of this changes during a merge, the file was replaced."""

    name: str
    """Relative to the folder that it was found in."""
    size: int
    pin: str
    """ETag, commit with object id, or time of the last change in nanoseconds."""
    inode: str = field(default="", compare=False)
    """Of a local file, where it says more, see ``inodes``."""

    def is_still(self, now: FileIdentity) -> bool:
        """Whether ``now``, under the same name, is still this file."""
        return self == now and not differ(self.inode, now.inode)


@dataclass(frozen=True, slots=True, kw_only=True)
class Listed:
    """A file as a list has it."""

    name: str
    size: int | None
    """None: the list does not tell; ``Store.look`` does."""
    modified: float
    """By the store's own clock, in seconds since the epoch."""


class Reader(Protocol):
    """One file, as it was when it was pinned. Threads may share it, each with its own buffer."""

    def read_into(self, buffer: memoryview, offset: int, nbytes: int) -> memoryview:
        """The ``nbytes`` at ``offset``, as a view inside ``buffer``.

        Args:
            buffer: page aligned, of at least ``nbytes + storage.SLACK`` bytes.

        Raises:
            StorageError: the read failed however often it was tried, or the file was replaced.
        """
        ...

    def read(self, offset: int, nbytes: int) -> memoryview:
        """The ``nbytes`` at ``offset`` in memory of their own. Raises as ``read_into`` does."""
        ...

    def close(self) -> None:
        """Give back what it holds."""
        ...


class PartWriter(Protocol):
    """A file under way, of a size that is known, which only ``Store.publish`` makes one."""

    def write(self, data: memoryview, offset: int) -> None:
        """Write ``data`` at ``offset``. Threads may call it, in nearly any order: each byte once,
        from a window of some tens of MB that moves on as it fills from below.

        ``data`` may be used again afterwards. For a local disk it must start on a page in memory
        where ``offset`` does in the file.

        Raises:
            StorageError: it failed however often it was tried; then ``discard`` is all that is
                left to do.
        """
        ...

    def write_small(self, data: bytes, offset: int) -> None:
        """The same for a little data, which may lie anywhere in memory."""
        ...

    def finish(self) -> str:
        """Make the whole durable: the part, for ``publish``.

        Raises:
            StorageError: bytes are missing, or the store failed.
        """
        ...

    def discard(self) -> None:
        """Leave nothing of it. Never raises."""
        ...


class Store(Protocol):
    """A folder in some store; names are relative to it, with slashes.

    Every method raises ``AbsentError`` where the file that it is about is not there, and any other
    ``StorageError`` where the store fails for good: what may pass by itself was tried again.
    """

    @property
    def location(self) -> Location:
        """Of the folder."""
        ...

    def look(self, name: str) -> FileIdentity:
        """Identity of a file as it is now."""
        ...

    def list(self, below: str = "") -> Iterator[Listed]:
        """The files in the folder ``below``, and in folders in there; no order, none if empty."""
        ...

    def get(self, name: str) -> bytes:
        """All of a small file."""
        ...

    def open(self, file: FileIdentity) -> Reader:
        """Open the file that was pinned.

        Raises:
            StorageError: it was replaced since. Some stores tell by the first read.
        """
        ...

    def put(self, name: str, data: bytes, *, durable: bool = True) -> None:
        """Have a file hold ``data``: whoever reads it meanwhile gets the old whole or the new.

        Args:
            durable: False: a crash of a machine may cost it, where that is faster.
        """
        ...

    def create(self, name: str, data: bytes) -> bool:
        """The same unless there is such a file; False then. Of several callers one succeeds."""
        ...

    def start(self, name: str, size: int, attempt: str) -> PartWriter:
        """Begin a part that may become ``name``.

        Args:
            attempt: unique among all that may ever write it.
        """
        ...

    def publish(self, part: str, name: str, size: int) -> None:
        """Make a finished part the file ``name``. Once more is harmless.

        Raises:
            StorageError: the part is gone, or of another size.
            TakenError: another part has that name already; a disk replaces it.
        """
        ...

    def sweep(self, name: str | None = None) -> None:
        """Remove the parts of ``name``, or all of this folder, finished or not."""
        ...

    def delete(self, name: str) -> None:
        """Remove a file, if it is there."""
        ...

    def clock(self) -> float:
        """The time by the clock that stamps files here, as far as it is told without a write; else
        by this machine's.
        """
        ...

"""A long read as several requests at once: one connection alone is slow, whatever the network."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

from merge_core.errors import replaced
from merge_core.storage import own_memory
from merge_core.stores.concurrently import concurrently
from merge_core.stores.location import Location
from merge_core.stores.store import FileIdentity

BLOCK_BYTES = 16 << 20
"""Of one request at most: long enough that its round trip does not matter, short enough that what
is worth it has several in flight."""

IN_FLIGHT = 8
"""Of one read at the same time; lanes read beside one another as well."""


def fill_in_blocks(
    target: memoryview, offset: int, fill: Callable[[memoryview, int], None]
) -> None:
    """Have ``fill`` read all of ``target``, which lies at ``offset``, in blocks of about one size.

    Raises:
        Exception: one that ``fill`` raises, once the blocks that are under way have ended.
    """
    blocks = -(-len(target) // BLOCK_BYTES)
    if blocks <= 1:
        fill(target, offset)
        return
    size = -(-len(target) // blocks)

    def fill_block(start: int) -> None:
        fill(target[start : start + size], offset + start)

    concurrently(fill_block, range(0, len(target), size), IN_FLIGHT)


class BlockReader(ABC):
    """See ``store.Reader``: of a store that is asked for one range after the other.

    Args:
        where: of the file itself.
    """

    def __init__(self, where: Location, file: FileIdentity) -> None:
        self._where, self._file = where, file

    def read_into(self, buffer: memoryview, offset: int, nbytes: int) -> memoryview:
        """See ``store.Reader``."""
        view = buffer[:nbytes]
        self._fill(view, offset)
        return view

    def read(self, offset: int, nbytes: int) -> memoryview:
        """See ``store.Reader``."""
        return self.read_into(own_memory(nbytes), offset, nbytes)

    def close(self) -> None:  # noqa: B027 - complete as it is
        """See ``store.Reader``: it holds nothing."""

    def _fill(self, view: memoryview, offset: int) -> None:
        if not 0 <= offset <= offset + len(view) <= self._file.size:
            raise replaced(self._where)
        if view:
            fill_in_blocks(view, offset, self._fill_block)

    @abstractmethod
    def _fill_block(self, view: memoryview, offset: int) -> None:
        """Fill ``view``, of at most ``BLOCK_BYTES``, with what lies at ``offset``."""

"""Large reads from a store as several requests at a time."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

BLOCK_BYTES = 16 << 20
"""Of one request at most: long enough that its round trip does not matter, short enough that
several are in flight for anything that is worth it. AWS advises 8 to 16 MB."""

IN_FLIGHT = 8
"""Requests of one read at the same time: S3 gives each connection some 90 MB/s."""

FillBlock = Callable[[memoryview, int], None]
"""Fills memory with what lies from an offset on, in one request."""


def fill(view: memoryview, offset: int, fill_block: FillBlock) -> None:
    """Fill ``view`` with what lies from ``offset`` on, in blocks of about the same size."""
    blocks = -(-len(view) // BLOCK_BYTES)
    if blocks < 2:
        if blocks:
            fill_block(view, offset)
        return
    size = -(-len(view) // blocks)
    starts = range(0, len(view), size)
    parts = [view[start : start + size] for start in starts]
    with ThreadPoolExecutor(min(blocks, IN_FLIGHT), "ranges") as threads:
        list(threads.map(fill_block, parts, [offset + start for start in starts]))


def fresh(nbytes: int) -> memoryview:
    """Memory from the system itself: malloc would keep what is freed, in each thread's arena."""
    return memoryview(mmap.mmap(-1, nbytes) if nbytes else b"")

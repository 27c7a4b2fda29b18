"""A long read as several requests at once: one connection alone is slow, whatever the network."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

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
        Exception: what ``fill`` raises first, once the blocks that are under way have ended.
    """
    blocks = -(-len(target) // BLOCK_BYTES)
    if blocks <= 1:
        fill(target, offset)
        return
    size = -(-len(target) // blocks)
    with ThreadPoolExecutor(min(blocks, IN_FLIGHT), "range") as threads:
        started = [
            threads.submit(fill, target[start : start + size], offset + start)
            for start in range(0, len(target), size)
        ]
        try:
            for each in started:
                each.result()
        finally:
            threads.shutdown(cancel_futures=True)

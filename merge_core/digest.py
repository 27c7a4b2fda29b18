"""The digest of a tensor: the same for any number of lanes, size of reads and order.

    cut the tensor's bytes into cells of 8 MiB (the last one may be shorter; none if empty)
    cell digest   = xxh3_128(cell), 16 bytes, big-endian
    tensor digest = xxh3_128(all cell digests, concatenated), as 32 hex digits

It finds corruption (a flipped bit, a lost write), not tampering: xxh3 is no cryptographic hash.
``examples/recompute_digests.py`` recomputes a whole checkpoint's digests from this description.
"""

from __future__ import annotations

from collections.abc import Iterable

import xxhash

CELL_BYTES = 8 << 20
"""A power of two so that cells start on pages; large enough for full disk speed, small enough
that a lane's buffers stay near 20 MB. Part of the format: changing it changes every digest."""


def new_cell() -> xxhash.xxh3_128:
    """A digest state for one cell: ``update`` it with consecutive pieces, then ask ``digest()``."""
    return xxhash.xxh3_128()


def cell_digest(data: memoryview) -> bytes:
    """Digest of a cell that is at hand as a whole."""
    return xxhash.xxh3_128_digest(data)


def tensor_digest(cells: Iterable[bytes]) -> str:
    """Digest of a tensor from its cells' digests, in order."""
    return xxhash.xxh3_128_hexdigest(b"".join(cells))


def bytes_digest(data: bytes | memoryview) -> str:
    """Digest of bytes that are at hand as a whole, such as a header or a factor."""
    view = memoryview(data).cast("B")
    starts = range(0, len(view), CELL_BYTES)
    return tensor_digest(cell_digest(view[start : start + CELL_BYTES]) for start in starts)

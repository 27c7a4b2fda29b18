"""The blocks of rows in which a delta is multiplied: fixed by the tensor's shape alone.

Matrix libraries take other code paths for a few rows than for many, which shows in the last bit.
So neither memory nor the size of reads may move these borders.
"""

from __future__ import annotations

from collections.abc import Iterator

MIN_BLOCK_ROWS = 64
"""Products of at least this many rows are bit-identical to the product of the whole matrix
(measured with MKL, ranks 4 to 128, sides of 16 and more; on smaller ones MKL's own last bit depends
on its number of threads); a short tail is joined to the block before it."""

BLOCK_ELEMENTS = {"cpu": 384 << 10, "cuda": 1 << 20}
"""Aim for the size of a block. CPU: two float32 blocks (3 MB) stay near the caches of a core,
where the passes over them cost half of what they cost from memory. CUDA: enough to fill the
device; the block is recomputed where a cell of the digest grid cuts through it."""


def block_rows(width: int, device: str) -> int:
    """Rows that are multiplied at once in a tensor of this width: a multiple of 16."""
    return max(MIN_BLOCK_ROWS, BLOCK_ELEMENTS[device] // max(width, 1) // 16 * 16)


def largest_block(rows: int, width: int, device: str) -> int:
    """Elements of the tensor's largest block, which is what a lane's scratch must hold."""
    block = block_rows(width, device)
    return (rows if rows < 2 * block else block + rows % block) * width


def blocks_over(
    rows: int, width: int, device: str, first: int, behind: int
) -> Iterator[tuple[int, int]]:
    """The blocks of rows, as (top, bottom), that hold elements ``first`` ... ``behind``."""
    block = block_rows(width, device)
    last = max(1, rows // block) - 1
    for number in range(min(first // width // block, last), last + 1):
        if number * block * width >= behind:
            return
        yield number * block, rows if number == last else (number + 1) * block

"""How a tensor's rows are cut into blocks: each row once, and no block too short."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from merge_core.blocks import block_rows, blocks_over, largest_block


@settings(max_examples=300, derandomize=True, deadline=None)
@given(
    rows=st.integers(1, 30_000),
    width=st.integers(1, 9_000),
    device=st.sampled_from(["cpu", "cuda"]),
    ends=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
def test_blocks_cover_every_row_once_and_are_never_short(
    rows: int, width: int, device: str, ends: tuple[float, float]
) -> None:
    every = list(blocks_over(rows, width, device, 0, rows * width))
    heights = [bottom - top for top, bottom in every]
    block = block_rows(width, device)

    assert [row for pair in every for row in pair][1:-1:2] == [top for top, _ in every[1:]]
    assert (every[0][0], every[-1][1]) == (0, rows)
    assert block >= 64
    assert block % 16 == 0
    assert heights[:-1] == [block] * (len(heights) - 1)
    assert heights[-1] >= min(block, rows)
    assert heights[-1] < 2 * block
    assert largest_block(rows, width, device) == max(heights) * width

    first, behind = sorted(int(end * (rows * width - 1)) for end in ends)
    behind += 1
    assert list(blocks_over(rows, width, device, first, behind)) == [
        (top, bottom) for top, bottom in every if top * width < behind and bottom * width > first
    ]

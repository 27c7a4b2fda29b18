"""Which requests bring many ranges of files: one what lies close together, several what is long."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

GAP_BYTES = 128 << 10
"""Read over rather than asking again: at most 1.6 % of the shortest block that is followed by one.
The time of a request is that of some MB."""

BLOCK_BYTES = 8 << 20
"""Of a block of what is long, up to twice that: see ``stores.blocks.BLOCK_BYTES``."""

KEPT_BYTES = 64 << 10
"""Of a range that is copied out of its block at once: norms and biases lie among the weights of
their layer, but are written at the end of a shard, when the block has long been let go."""


@dataclass(frozen=True, slots=True, order=True)
class Range:
    """Bytes of a file, from one to behind another."""

    file: int
    """Number of its reader."""
    first: int
    behind: int

    @property
    def nbytes(self) -> int:
        """How many."""
        return self.behind - self.first


def blocks_of(ranges: Sequence[Range]) -> dict[Range, int]:
    """The requests that bring ``ranges``, in the order in which these come first, each with the
    bytes of it that are taken out of it when they are asked for.
    """
    blocks = []
    small = sorted(one for one in ranges if 0 < one.nbytes <= KEPT_BYTES)
    for run in _in_order(ranges) or _joined(ranges, GAP_BYTES):
        count = max(1, run.nbytes // BLOCK_BYTES)
        borders = [run.first + run.nbytes * n // count for n in range(count + 1)]
        borders = [_outside(small, run.file, border) for border in borders]
        blocks += [Range(run.file, *pair) for pair in itertools.pairwise(borders)]
    order = {block: 0 for wanted in ranges for block in overlapping(blocks, wanted)}
    for wanted in _joined((one for one in ranges if one.nbytes > KEPT_BYTES), 0):
        for block in overlapping(blocks, wanted):
            order[block] += min(block.behind, wanted.behind) - max(block.first, wanted.first)
    return order


def _outside(small: Sequence[Range], file: int, border: int) -> int:
    """The border, or behind the small range that it would cut in two."""
    return max(
        [border] + [s.behind for s in small if s.file == file and s.first < border < s.behind]
    )


def _in_order(ranges: Sequence[Range]) -> list[Range]:
    """What lies close together and is read in that order, as one; nothing if these overlap.

    Layer 10 often lies behind layer 1. A block that held bytes of both would be let go before all
    of it was taken.
    """
    runs: list[Range] = []
    for each in ranges:
        last = runs[-1] if runs else None
        if each.nbytes <= KEPT_BYTES:
            continue
        if last and each.file == last.file and 0 <= each.first - last.behind <= GAP_BYTES:
            runs[-1] = Range(last.file, last.first, each.behind)
        else:
            runs.append(each)
    for small in sorted(one for one in ranges if 0 < one.nbytes <= KEPT_BYTES):
        runs = _with(runs, small)
    runs.sort()
    apart = all(a.file != b.file or a.behind <= b.first for a, b in itertools.pairwise(runs))
    return runs if apart else []


def _with(runs: list[Range], small: Range) -> list[Range]:
    """The same, with a range that is read later: part of what it lies close to, or alone."""
    for number, run in enumerate(runs):
        first, behind = min(run.first, small.first), max(run.behind, small.behind)
        if run.file == small.file and behind - first <= run.nbytes + small.nbytes + GAP_BYTES:
            return [*runs[:number], Range(run.file, first, behind), *runs[number + 1 :]]
    return [*runs, small]


def _joined(ranges: Iterable[Range], gap: int) -> Iterator[Range]:
    """What lies no further apart than ``gap`` bytes, as one, sorted."""
    run: Range | None = None
    for each in sorted(one for one in ranges if one.nbytes):
        if run and each.file == run.file and each.first <= run.behind + gap:
            run = Range(run.file, run.first, max(run.behind, each.behind))
            continue
        if run:
            yield run
        run = each
    if run:
        yield run


def overlapping(blocks: Sequence[Range], wanted: Range) -> Iterator[Range]:
    """Those of the sorted ``blocks`` that hold bytes of ``wanted``, which has no gap."""
    start = bisect.bisect_right(
        blocks, (wanted.file, wanted.first), key=lambda block: (block.file, block.behind)
    )
    for number in range(start, len(blocks)):
        block = blocks[number]
        if block.file != wanted.file or block.first >= wanted.behind:
            return
        if block.behind > wanted.first:
            yield block

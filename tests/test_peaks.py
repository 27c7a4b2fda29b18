"""The most memory that a shard took."""

from __future__ import annotations

import mmap
from pathlib import Path

import psutil
import pyarrow.parquet as pq

from merge_core.merge import merge
from merge_core.peaks import Peaks
from merge_core.plan import MergePlan

MUCH = 256 << 20
LITTLE = 16 << 20
"""What else the process may take or give back meanwhile."""


def test_the_peak_holds_what_was_given_back_and_starts_anew() -> None:
    Peaks.start("cpu")
    before = psutil.Process().memory_info().rss
    with mmap.mmap(-1, MUCH) as eaten:  # the allocator may keep what is freed
        for _ in range(MUCH // LITTLE):
            eaten.write(b"\1" * LITTLE)

    peak = Peaks.since_start("cpu")

    assert peak.vram is None
    assert before + MUCH - LITTLE < peak.memory
    Peaks.start("cpu")
    assert Peaks.since_start("cpu").memory < peak.memory - MUCH + 2 * LITTLE


def test_the_ledger_says_what_each_shard_took(small: MergePlan, out: Path) -> None:
    resident = psutil.Process().memory_info().rss

    result = merge(small, out)

    rows = pq.read_table(out / ".raymeld" / "ledger.parquet").to_pylist()
    taken = {row["shard"]: (row["peak_memory"], row["peak_vram"]) for row in rows}
    assert taken == {r.shard: (r.peak_memory, None) for r in result.receipts}
    assert all(memory > resident // 2 for memory, _ in taken.values())

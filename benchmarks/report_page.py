"""How long the report of a 72B takes to be written, and to be drawn by a browser.

    python benchmarks/report_page.py

963 tensors, 82 shards, 64 workers, of a merge that nobody did. Needs Chromium.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from browser import browser, shown  # noqa: E402
from played import QWEN_72B, hollow_plan, play  # noqa: E402

from cluster.report.evidence import read_evidence  # noqa: E402
from cluster.report.page import page  # noqa: E402
from merge_core.stores.location import locate  # noqa: E402

ROUNDS = 5


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch, browser() as chromium:
        path = Path(scratch) / "report.html"
        plan = hollow_plan(Path(scratch), QWEN_72B, shard_bytes=2_000_000_000)
        out = play(plan, Path(scratch) / "out", workers=64)
        written, drawn = [], []
        for _ in range(ROUNDS):
            clock = time.perf_counter()
            path.write_text(page(read_evidence(locate(out)), []), encoding="utf-8")
            written.append(time.perf_counter() - clock)
            clock = time.perf_counter()
            with shown(chromium, path):
                drawn.append(time.perf_counter() - clock)
        size = path.stat().st_size / 1e6
        print(f"{size:.2f} MB, written in {median(written):.2f} s, drawn in {median(drawn):.2f} s")


if __name__ == "__main__":
    main()

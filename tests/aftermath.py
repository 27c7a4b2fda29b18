"""What a merge may leave behind, and what not."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

import psutil
from handmade import files_below

KEPT = {
    *("config.json", "ledger.parquet", "plan.json", "progress.json", "recipe.yaml"),
    "verified.json",
}
"""In ``.raymeld``, beside one file of the lease."""


def assert_tidy(out: Path) -> None:
    """Nothing is left of parts, receipts, temporary files and takeovers; each run is told of."""
    state = out / ".raymeld"
    left = set(files_below(state)) - KEPT
    lease = {name for name in left if re.fullmatch(r"lease/\d{8}\.json", name)}
    runs = {name for name in left if re.fullmatch(r"runs/\d{8}T\d{6}Z-[0-9a-f]{8}\.json", name)}
    assert (left - lease - runs, len(lease)) == (set(), 1)
    assert runs
    assert {path.name for path in state.iterdir() if path.is_dir()} == {"lease", "runs"}
    assert not list(out.glob(".*.tmp"))


def actors_of(mark: str) -> list[str]:
    """The live actors of the cluster that was started with ``RAYMELD_TEST=mark``."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            name = " ".join(process.cmdline())
            ours = re.match(r"ray::\w*(Merger|Collector|Checker)", name)
            if ours and process.environ().get("RAYMELD_TEST") == mark:
                found.append(f"{process.pid} {name}")
    return found

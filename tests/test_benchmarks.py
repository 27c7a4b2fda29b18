"""The benchmarks that need no hardware still run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


def run(name: str, *words: str) -> str:
    command = [sys.executable, BENCHMARKS / name, *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_driver_gets_every_shard_done_whatever_its_workers_do() -> None:
    said = run("schedule.py", "--shards", "600", "--workers", "60")

    assert "| 600 | 60 |" in said
    assert "'ItemDone': 1200," in said
    assert "'WorkerLost'" in said


def test_the_pages_show_what_the_code_computes() -> None:
    """``benchmarks/estimates.py --write`` mends them."""
    blocks, *_ = run("estimates.py").split()

    assert int(blocks) >= 14

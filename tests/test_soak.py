"""Ten merges on a cluster whose processes are killed at random: none is lost."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

CHAOS = Path(__file__).parent.parent / "benchmarks" / "chaos.py"
ROUNDS = ["--seed", "20261128", "--first", "79", "--rounds", "10"]
"""Of the two hundred in benchmarks/results: ten in a row in which everything is killed that can be,
twice at the first call, which comes however fast the machine is; and no driver so often that it
takes minutes."""
VICTIMS = {"collector", "drain", "driver", "memory", "raylet", "worker"}


def test_ten_merges_whose_processes_are_killed_at_random_lose_nothing() -> None:
    ended = subprocess.run([sys.executable, CHAOS, *ROUNDS], capture_output=True, text=True)

    assert ended.returncode == 0, ended.stderr
    numbers = json.loads(ended.stdout)
    assert (numbers["rounds"], numbers["lost"]) == (10, 0)
    assert numbers["happened"].keys() == VICTIMS

"""The Slurm script, run: its srun is a stand-in that starts every node here, all else is real."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "examples" / "clusters" / "slurm.sh"

SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do shift; done
[[ $RAY_AUTH_MODE == token && ${#RAY_AUTH_TOKEN} == 64 ]] || exit 1
for ((node = 0; node < SLURM_JOB_NUM_NODES; node++)); do
    SLURM_NODEID=$node "$@" &
    tasks+=($!)
done
trap 'kill "${tasks[@]}"' TERM
wait
wait
"""

SCONTROL = """#!/usr/bin/env bash
[[ "$1 $2" == "show hostnames" ]] && printf '%s\\n' 127.0.0.1 nowhere
"""


@pytest.fixture
def scratch() -> Iterator[Path]:
    """Short: a socket's path may not exceed 107 bytes."""
    path = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
    yield path
    shutil.rmtree(path)


@pytest.fixture
def job(tmp_path: Path, scratch: Path) -> dict[str, str]:
    """The environment of a job of two nodes."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, text in {"srun": SRUN, "scontrol": SCONTROL}.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    return {
        **kept,
        "HOME": str(tmp_path),
        "PATH": f"{tools}:{os.environ['PATH']}",
        "RAYMELD_VENV": str(Path(sys.executable).parent.parent),
        "RAYMELD_SCRATCH": str(scratch),
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_CPUS_ON_NODE": "2",
    }


def processes_in(scratch: Path) -> list[str]:
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = " ".join(process.info["cmdline"] or [])
        if str(scratch) in words:
            found.append(words)
    return found


def test_the_script_merges_on_two_nodes_and_leaves_nothing_running(
    job: dict[str, str], base: Path, adapter: Path, out: Path, scratch: Path
) -> None:
    words = ["bash", SCRIPT, base, adapter, out, "--workers", "2", "--shard-size", "70KB"]

    done = subprocess.run(words, env=job, capture_output=True, text=True, timeout=120)

    assert done.returncode == 0, done.stderr
    assert (out / "config.json").exists()
    assert "workers: at most 2 on cpu" in done.stderr
    assert processes_in(scratch) == []


def test_without_its_three_arguments_it_says_how_it_is_called(job: dict[str, str]) -> None:
    done = subprocess.run(["bash", SCRIPT, "base"], env=job, capture_output=True, text=True)

    assert done.returncode == 2
    assert done.stderr.startswith("usage: sbatch")

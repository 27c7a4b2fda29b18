"""What one core gets done of data that is in memory: what cluster/estimate.py reckons with.

    python benchmarks/core_speed.py --dir /dev/shm

Merges four layers of a 7B on one core and checks the result at each level. In memory, so that
reading and writing cost no more than a copy. Seconds are CPU time, and the best of some rounds
counts: whatever else runs on the machine only ever makes it more. Linux only.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # numpy's threads would wait for one another, spinning

import machine
from checkpoints import config, make_adapter, make_checkpoint
from report import Page

from merge_core.factors import seal
from merge_core.merge import merge
from merge_core.plan import MergePlan
from merge_core.planner import make_plan
from merge_core.verify import verify

SHAPES = config("7B") | {"num_hidden_layers": 4, "vocab_size": 1024}
"""Nearly all of it is in linear layers, as in a large model."""

RANKS = (16, 64, 256)
ROUNDS = 3


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dir", type=Path, default=Path("/dev/shm"), help="a tmpfs with 4 GB")
    parser.add_argument("--results", action="store_true", help="write to benchmarks/results")
    options = parser.parse_args()
    directory = options.dir
    facts = machine.describe(directory)
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # inherited by every thread
    speeds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        base, out = Path(scratch) / "base", Path(scratch) / "out"
        make_checkpoint(SHAPES, base)
        for rank in RANKS:
            adapter = Path(scratch) / f"adapter-r{rank}"
            make_adapter(SHAPES, adapter, rank=rank)
            plan = make_plan(base, [adapter], shard_bytes=500_000_000)
            for _ in range(ROUNDS):
                for name, speed in _speeds(plan, out, ("digest", "numeric") * (rank == RANKS[0])):
                    speeds.setdefault(name.format(rank=rank), []).append(speed)
    table = [
        f"| one core, {plan.total_size / 1e9:.2f} GB | GB a second |",
        "|---|--:|",
    ]
    table += [f"| {name} | {max(each) / 1e9:.2f} |" for name, each in speeds.items()]
    notes = [f"of the result, or of the adapter; the best of {ROUNDS} rounds"]
    page = Page(title="Speed of a core", machine=facts, table=table, notes=notes, runs=speeds)
    page.show(keep_as="core-speed" if options.results else None)


def _speeds(plan: MergePlan, out: Path, levels: Sequence[str]) -> Iterator[tuple[str, float]]:
    """Bytes of the adapter, or of the result, a second of CPU time, by what is done."""
    clock = time.process_time()
    seal(plan)
    yield "adapter checked, r={rank}", plan.adapters[0].file.size / (time.process_time() - clock)
    shutil.rmtree(out, ignore_errors=True)
    clock = time.process_time()
    merge(plan, out, device="cpu", level="structure")
    yield "merged, r={rank}", plan.total_size / (time.process_time() - clock)
    for level in levels:
        clock = time.process_time()
        assert verify(out, level).ok
        yield f"verified, {level}, r={{rank}}", plan.total_size / (time.process_time() - clock)


if __name__ == "__main__":
    main()

"""The merge's arithmetic on a GPU, against the device's own copy; and whole merges from memory.

    python benchmarks/gpu_kernel.py
    python benchmarks/gpu_kernel.py --base /dev/shm/base --adapter /dev/shm/adapter

Bytes are counted as the copy counts them: bf16 read plus bf16 written. "whole tensor" is one call
of the kernel a tensor; "cells" is what a merge does, one call for each 8 MiB; with four lanes, on
four streams at once. For the second form put everything on a tmpfs, which is page cache: on a
disk raymeld reads and writes past it. Needs CUDA; no Ray.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

import machine
import torch
from checkpoints import config

from merge_core.architecture import expected_tensors
from merge_core.blocks import largest_block
from merge_core.digest import CELL_BYTES
from merge_core.kernel import LoadedUpdates, MergeKernel
from merge_core.memory import MAX_LANES
from merge_core.merge import merge
from merge_core.planner import make_plan
from merge_core.updates.low_rank import LoadedLowRank
from merge_core.updates.piece import Piece
from merge_core.worker import exact_float32

RANK, REPEATS = 16, 20
Shape = tuple[int, int]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="72B", help="whose shapes")
    parser.add_argument("--base", type=Path)
    parser.add_argument("--adapter", type=Path)
    parser.add_argument("--rounds", type=int, default=5, help="merges of --base")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("error: no CUDA device here; this measures a GPU")
    if (options.base is None) != (options.adapter is None):
        parser.error("--base and --adapter go together")
    facts = machine.describe(options.base or Path.cwd())
    print("\n".join(f"- {key}: {value}" for key, value in facts.items()), end="\n\n")
    with exact_float32():
        print("\n".join(_kernel_table(options.model)), end="\n\n")
    if options.base is not None:
        print("\n".join(_merge_table(options.base, options.adapter, options.rounds)))


def _kernel_table(model: str) -> Iterator[str]:
    """One line a shape of the model's linear layers, and one for all of a layer's together."""
    counts = Counter(
        shape
        for name, shape in expected_tensors(config(model))
        if name.startswith("model.layers.0.") and name.endswith("_proj.weight")
    )
    ways = {"whole tensor": (False, 1), "cells": (True, 1), "cells, lanes": (True, MAX_LANES)}
    yield f"| {model}, r={RANK}, GB/s | copy | " + " | ".join(ways) + " |"
    yield "|---|" + "--:|" * (1 + len(ways))
    total, moved = [0.0] * (1 + len(ways)), 0
    for shape, count in counts.items():
        rows, width = shape
        spent = [_copy_seconds((rows, width))]
        spent += [_kernel_seconds((rows, width), *way) for way in ways.values()]
        nbytes = 2 * 2 * rows * width
        yield _line(f"{count} x {rows} x {width}", nbytes, spent)
        total = [a + count * b for a, b in zip(total, spent, strict=True)]
        moved += count * nbytes
    yield _line("a layer", moved, total)


def _line(name: str, nbytes: int, spent: Sequence[float]) -> str:
    copy, *merged = (nbytes / seconds / 1e9 for seconds in spent)
    cells = [f"{copy:,.0f}", *(f"{rate:,.0f} ({rate / copy:.0%})" for rate in merged)]
    return f"| {name} | " + " | ".join(cells) + " |"


def _copy_seconds(shape: Shape) -> float:
    source = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    target = torch.empty_like(source)
    return _median_seconds(lambda: target.copy_(source))


def _kernel_seconds(shape: Shape, in_cells: bool, lanes: int) -> float:
    """Seconds to merge a tensor of this shape that lies on the device, into another."""
    rows, width = shape
    source = torch.randn(rows * width, device="cuda", dtype=torch.bfloat16)
    target = torch.empty_like(source)
    a = torch.randn(RANK, width, device="cuda") * 0.01
    b = torch.randn(rows, RANK, device="cuda") * 0.01
    low_rank = LoadedLowRank(a=a, b=b, scaling=2.0, transposed=False)
    updates = LoadedUpdates(deltas=(low_rank,))
    piece = CELL_BYTES // 2 if in_cells else rows * width
    starts = range(0, rows * width, piece)
    block, cuda = largest_block(rows, width, "cuda"), torch.device("cuda")
    kernels = [MergeKernel(block, 2, cuda) for _ in range(lanes)]
    streams = [torch.cuda.Stream() for _ in range(lanes)]  # type: ignore[no-untyped-call]

    def lane(number: int) -> None:
        with torch.cuda.stream(streams[number]):
            for first in starts[number::lanes]:
                run = slice(first, min(first + piece, rows * width))
                cell = Piece(matrix=shape, first=first, behind=run.stop, source_first=first)
                kernels[number].merge(updates, cell, source[run], target[run])

    with ThreadPoolExecutor(lanes) as pool:

        def work() -> None:
            current = torch.cuda.current_stream()
            for stream in streams:
                stream.wait_stream(current)  # not before the event that starts the clock
            list(pool.map(lane, range(lanes)))
            for stream in streams:
                current.wait_stream(stream)

        return _median_seconds(work)


def _median_seconds(work: Callable[[], object]) -> float:
    """Between two CUDA events around ``work``, after three runs that warm up."""
    for _ in range(3):
        work()
    spent: list[float] = []
    for _ in range(REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
        start.record()
        work()
        end.record()
        end.synchronize()
        spent.append(start.elapsed_time(end) / 1000)
    return median(spent)


def _merge_table(base: Path, adapter: Path, rounds: int) -> Iterator[str]:
    """Whole merges beside ``base``, in this process, without Python's and torch's start."""
    plan = make_plan(base, [adapter])
    out, size = base.with_name(f"{base.name}-merged-by-benchmark"), plan.total_size
    yield f"| {base.name}, {size / 1e9:.2f} GB | median s | min-max s | GB/s out | peak VRAM |"
    yield "|---|--:|--:|--:|--:|"
    for level in ("structure", "digest"):
        spent = []
        torch.cuda.reset_peak_memory_stats()
        for _ in range(rounds):
            shutil.rmtree(out, ignore_errors=True)
            _read_all(plan.base.local / file.name for file in plan.base_files)
            spent.append(merge(plan, out, level=level, device="cuda").seconds)
        shutil.rmtree(out)
        vram = torch.cuda.max_memory_allocated() / 1e6
        times = f"{median(spent):.2f} | {min(spent):.2f}-{max(spent):.2f}"
        rate = size / median(spent) / 1e9
        yield f"| merge, --verify {level} | {times} | {rate:.2f} | {vram:,.0f} MB |"


def _read_all(paths: Iterator[Path]) -> None:
    """Bring the files into the page cache."""
    block = bytearray(16 << 20)
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while file.readinto(block):
                pass


if __name__ == "__main__":
    main()

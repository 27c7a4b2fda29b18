"""How fast a merge is whose base lies behind plain HTTP, against the client library alone.

    make bench-storage
    python benchmarks/hub.py --model 1.8B --rounds 3 --results

A Hugging Face hub on this machine, over loopback, gives the base; the result goes to the disk. Each
row is a process of its own.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from statistics import median
from typing import Any

import machine
from report import Page
from store_rows import models, one_round, parser, weights_in

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))  # whose hub this is

from hub_server import Hub

MODEL = "bench/base"
TITLES = {
    "ranges": "client library, ranges, nothing kept",
    "snapshot": "client library, snapshot to the disk",
    "merge": "raymeld merge to the disk, --verify structure",
}


def main() -> None:
    options = parser(str(__doc__), model="1.8B", rounds=3).parse_args()
    with models(options, "hub") as place, Hub() as hub:
        base, facts = place / "base", machine.describe(place)
        size = sum(weights_in(base))
        hub.repo(MODEL, {file.name: file.read_bytes() for file in base.iterdir()})
        shutil.rmtree(base)
        os.environ |= {"HF_ENDPOINT": hub.address, "HF_HOME": str(place / "home")}
        os.environ["HF_HUB_DISABLE_XET"] = "1"
        runs = [_round(number, place) for number in range(options.rounds)]
    page = Page(
        title=f"Qwen1.5-{options.model} from a hub to the disk",
        machine=facts,
        table=_table(runs, size),
        notes=[
            f"rounds: {len(runs)}; weights: {size / 1e9:.3f} GB; sync included",
            "x slower: throughput over that of the slower of the two plain rows, median of rounds",
            "the hub runs on the same cores, over loopback, without TLS",
        ],
        runs={str(number): run for number, run in enumerate(runs)},
    )
    page.show(keep_as=f"hub-{options.model}" if options.results else None)


def _round(number: int, place: Path) -> dict[str, dict[str, Any]]:
    adapter, out = str(place / "adapter"), place / "out"
    merge = ["merge", f"hf://{MODEL}", adapter, "--out", str(out), "--address", "inline"]
    rows = {
        "ranges": ["ranges", MODEL],
        "snapshot": ["snapshot", MODEL, str(out)],
        "merge": ["raymeld", *merge, "--verify", "structure", "--quiet"],
    }
    return one_round(number, rows, TITLES, lambda: shutil.rmtree(out, ignore_errors=True))


def _table(runs: list[dict[str, dict[str, Any]]], size: int) -> list[str]:
    lines = ["| | median s | MB/s | x slower | peak memory |", "|---|--:|--:|--:|--:|"]
    for name, title in TITLES.items():
        seconds = median(run[name]["seconds"] for run in runs)
        slower = median(
            max(run["ranges"]["seconds"], run["snapshot"]["seconds"]) / run[name]["seconds"]
            for run in runs
        )
        memory = max(run[name]["peak_memory"] for run in runs) / 1e6
        speed = size / 1e6 / seconds
        lines.append(f"| {title} | {seconds:.2f} | {speed:.0f} | {slower:.2f} | {memory:,.0f} MB |")
    return lines


if __name__ == "__main__":
    main()

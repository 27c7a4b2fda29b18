"""How fast a merge is whose base lies behind plain HTTP, against the client library alone.

    make bench-storage
    python benchmarks/hub.py --model 1.8B --rounds 3 --results

A Hugging Face hub on this machine, over loopback, gives the base; the result goes to the disk. Each
row is a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

import machine
from checkpoints import FAMILY, config, make_adapter, make_checkpoint
from measure import drop_page_cache
from report import Page

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent / "tests"))  # whose hub this is

from hub_server import Hub  # noqa: E402

MODEL = "bench/base"
TITLES = {
    "ranges": "client library, ranges, nothing kept",
    "snapshot": "client library, snapshot to the disk",
    "merge": "raymeld merge to the disk, --verify structure",
}


def main() -> None:
    options = _options()
    place = options.dir / f"raymeld-bench-hub-{options.model}"
    shutil.rmtree(place, ignore_errors=True)  # of a run that was stopped
    place.mkdir(parents=True)
    base, adapter = place / "base", place / "adapter"
    make_checkpoint(config(options.model), base)
    make_adapter(config(options.model), adapter)
    size = sum(file.stat().st_size for file in base.glob("*.safetensors"))
    facts = machine.describe(place)
    with Hub() as hub:
        hub.repo(MODEL, {file.name: file.read_bytes() for file in base.iterdir()})
        shutil.rmtree(base)
        os.environ |= {"HF_ENDPOINT": hub.address, "HF_HOME": str(place / "home")}
        os.environ["HF_HUB_DISABLE_XET"] = "1"
        runs = [_round(number, adapter, place / "out") for number in range(options.rounds)]
    shutil.rmtree(place)
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


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=FAMILY, default="1.8B")
    parser.add_argument("--dir", type=Path, default=Path("/tmp/raymeld-bench"), help="on the disk")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--results", action="store_true", help="keep them in benchmarks/results")
    return parser.parse_args()


def _round(number: int, adapter: Path, out: Path) -> dict[str, dict[str, Any]]:
    """Every row once."""
    merge = ["merge", f"hf://{MODEL}", str(adapter), "--out", str(out), "--address", "inline"]
    words = {
        "ranges": ["ranges", MODEL],
        "snapshot": ["snapshot", MODEL, str(out)],
        "merge": ["raymeld", *merge, "--verify", "structure", "--quiet"],
    }
    names = list(words)
    found = {}
    for name in names[number % 3 :] + names[: number % 3]:
        shutil.rmtree(out, ignore_errors=True)
        os.sync()
        drop_page_cache()
        command = [sys.executable, str(HERE / "storage_client.py"), *words[name]]
        said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        found[name] = json.loads(said.splitlines()[-1])
        print(f"round {number + 1}: {found[name]['seconds']:6.2f} s  {TITLES[name]}", flush=True)
    return found


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

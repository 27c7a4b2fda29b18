"""How a merge's throughput grows with its connections, where each of them is slow.

    python benchmarks/connections.py --rounds 1 --results

Between raymeld and an S3 server on this machine stands a link: each connection gets so many bytes a
second each way, and all of them together no more than the link has. A merge of one lane uploads
over one connection, one of eight lanes over eight.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import machine
import storage_client
from checkpoints import FAMILY, config, make_adapter, make_checkpoint
from link import Link
from report import Page
from storage import fill

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent / "tests"))  # whose server this is

from s3_server import ENVIRONMENT, s3_server  # noqa: E402

COUNTS = (1, 2, 4, 8)


def main() -> None:
    if len(sys.argv) > 1 and sys.argv[1] in ROWS:
        print(json.dumps(ROWS[sys.argv[1]](*sys.argv[2:])))
        return
    options = _options()
    place = options.dir / f"raymeld-bench-connections-{options.model}"
    shutil.rmtree(place, ignore_errors=True)  # of a run that was stopped
    place.mkdir(parents=True)
    base, adapter = place / "base", place / "adapter"
    make_checkpoint(config(options.model), base)
    make_adapter(config(options.model), adapter)
    size = sum(file.stat().st_size for file in base.glob("*.safetensors"))
    facts = machine.describe(place)
    with s3_server() as address:
        link = Link(address, options.link * 1e6, options.connection * 1e6)
        os.environ |= {**ENVIRONMENT, "AWS_ENDPOINT_URL": address}
        fill(base)
        os.environ["AWS_ENDPOINT_URL"] = link.address
        runs = [_round(number, adapter) for number in range(options.rounds)]
        link.close()
    shutil.rmtree(place)
    page = Page(
        title=f"Qwen1.5-{options.model} over slow connections",
        machine=facts,
        table=_table(runs, size, options.link),
        notes=[
            f"rounds: {len(runs)}, medians; {size / 1e9:.3f} GB read from S3 and written to it",
            f"a connection has {options.connection:g} MB/s each way, the link {options.link:g}",
            "client library: as many connections, each reading a block and then writing it",
            "MB/s: written, while shards are merged",
            "of the link: of what it carries each way",
        ],
        runs={str(number): run for number, run in enumerate(runs)},
    )
    page.show(keep_as="connections" if options.results else None)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=FAMILY, default="0.5B")
    parser.add_argument("--connection", type=float, default=10.0, help="MB/s of one, each way")
    parser.add_argument("--link", type=float, default=50.0, help="MB/s of all, each way")
    parser.add_argument("--dir", type=Path, default=Path("/tmp/raymeld-bench"), help="on the disk")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--results", action="store_true", help="keep them in benchmarks/results")
    return parser.parse_args()


def _round(number: int, adapter: Path) -> dict[str, dict[str, float]]:
    """Seconds of both rows, by lanes or connections."""
    found: dict[str, dict[str, float]] = {name: {} for name in ROWS}
    for count in map(str, COUNTS):
        for name in ROWS:
            words = [name, str(adapter), f"s3://bench/{name}-{number}-{count}", count]
            command = [sys.executable, str(HERE / "connections.py"), *words]
            said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            found[name][count] = float(json.loads(said.splitlines()[-1]))
            print(f"round {number + 1}: {found[name][count]:6.1f} s  {name} {count}", flush=True)
    return found


def _copy(_adapter: str, out: str, connections: str) -> float:
    """The client library alone: seconds."""
    clock = time.perf_counter()
    storage_client.copy(["s3://bench/base", out], int(connections))
    return time.perf_counter() - clock


def _merge(adapter: str, out: str, lanes: str) -> float:
    """Seconds that the shards of a merge took."""
    from merge_core.memory import LaneChoice
    from merge_core.merge import merge
    from merge_core.planner import make_plan

    plan = make_plan("s3://bench/base", [adapter])
    choice = LaneChoice(lanes=int(lanes), read_bytes=1 << 20, reason="of the benchmark")
    done = merge(plan, out, level="structure", choice=choice)
    return sum(receipt.seconds for receipt in done.receipts)


ROWS = {"copy": _copy, "merge": _merge}


def _table(runs: list[dict[str, dict[str, float]]], size: int, link: float) -> list[str]:
    lines = [
        "| connections, lanes | client library MB/s | merge MB/s | of one lane | of the link |",
        "|--:|--:|--:|--:|--:|",
    ]
    speeds = {
        (name, count): size / 1e6 / median(run[name][str(count)] for run in runs)
        for name in ROWS
        for count in COUNTS
    }
    for count in COUNTS:
        merged = speeds["merge", count]
        lines.append(
            f"| {count} | {speeds['copy', count]:.1f} | {merged:.1f}"
            f" | {merged / speeds['merge', 1]:.2f} | {merged / link:.0%} |"
        )
    return lines


if __name__ == "__main__":
    main()

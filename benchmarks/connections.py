"""How a merge's throughput grows with its connections, where each of them is slow.

    python benchmarks/connections.py --rounds 1 --results

Between raymeld and an S3 server on this machine stands a link: each connection gets so many bytes a
second each way, and all of them together no more than the link has. A merge of one lane uploads
over one connection, one of eight lanes over eight.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from statistics import median

import machine
import storage_client
from link import Link
from report import Page
from storage import fill
from store_rows import answer, models, parser, weights_in

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))  # whose server this is

from s3_server import ENVIRONMENT, s3_server

COUNTS = (1, 2, 4, 8)


def main() -> None:
    if len(sys.argv) > 1 and sys.argv[1] in ROWS:
        print(json.dumps(ROWS[sys.argv[1]](*sys.argv[2:])))
        return
    asked = parser(str(__doc__), model="0.5B", rounds=1)
    asked.add_argument("--connection", type=float, default=10.0, help="MB/s of one, each way")
    asked.add_argument("--link", type=float, default=50.0, help="MB/s of all, each way")
    options = asked.parse_args()
    with models(options, "connections") as place, s3_server() as address:
        facts, size = machine.describe(place), sum(weights_in(place / "base"))
        link = Link(address, options.link * 1e6, options.connection * 1e6)
        os.environ |= {**ENVIRONMENT, "AWS_ENDPOINT_URL": address}
        fill(place / "base")
        os.environ["AWS_ENDPOINT_URL"] = link.address
        runs = [_round(number, place / "adapter") for number in range(options.rounds)]
        link.close()
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


def _round(number: int, adapter: Path) -> dict[str, dict[str, float]]:
    """Seconds of both rows, by lanes or connections."""
    found: dict[str, dict[str, float]] = {name: {} for name in ROWS}
    for count in map(str, COUNTS):
        for name in ROWS:
            words = [name, str(adapter), f"s3://bench/{name}-{number}-{count}", count]
            found[name][count] = float(answer("connections.py", words))
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

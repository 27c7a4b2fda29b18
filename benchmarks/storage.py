"""How fast a merge is whose base and result lie in S3, against the client library alone.

    make bench-storage
    python benchmarks/storage.py --model 1.8B --rounds 3 --results
    python benchmarks/storage.py --link 80 --rounds 1 --results

A real S3 server (OpenStack Swift) on this machine keeps base and result. Each row is a process of
its own; the plain ones make requests of the size and number at a time that raymeld has. Without
--link server and client take the same cores from each other, so that nobody reads and writes at
once as fast as each alone; with it the network is what everybody waits for, as between machines.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from statistics import median
from typing import Any

import machine
from link import Link
from report import Page
from store_rows import models, one_round, parser, weights_in

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))  # whose server this is

from s3_server import ENVIRONMENT, s3_server

TITLES = {
    "download": "client library, download",
    "upload": "client library, upload",
    "copy": "client library, download and upload at once",
    "merge": "raymeld merge, --verify structure",
}
HEADINGS = ("", "median s", "MB/s", "x slower", "x copy", "peak memory", "requests", "read")


def main() -> None:
    asked = parser(str(__doc__), model="1.8B", rounds=3)
    asked.add_argument("--link", type=float, default=0.0, help="MB/s each way; 0: none")
    options = asked.parse_args()
    with models(options, "storage") as place, s3_server() as address:
        facts, sizes = machine.describe(place), weights_in(place / "base")
        os.environ |= {**ENVIRONMENT, "AWS_ENDPOINT_URL": address}
        fill(place / "base")
        if options.link:
            os.environ["AWS_ENDPOINT_URL"] = Link(address, options.link * 1e6).address
        runs = [_round(number, place / "adapter", sizes) for number in range(options.rounds)]
    page = Page(
        title=f"Qwen1.5-{options.model} from S3 to S3",
        machine=facts,
        table=_table(runs, sum(sizes)),
        notes=[*_notes(runs, sum(sizes)), _about_link(options.link)],
        runs={str(number): run for number, run in enumerate(runs)},
    )
    name = f"storage-{options.model}" + "-over-a-link" * bool(options.link)
    page.show(keep_as=name if options.results else None)


def fill(base: Path) -> None:
    """Put a checkpoint into the bucket that is made for it."""
    from merge_core.carrying import carry
    from merge_core.plan import SideFile
    from merge_core.stores.location import DEFAULT_ACCESS, locate
    from merge_core.stores.opening import open_store
    from merge_core.stores.s3_client import client_for

    client_for(DEFAULT_ACCESS).create_bucket(Bucket="bench")
    source = locate(base)
    for path in base.iterdir():
        file = open_store(source).look(path.name)
        side = SideFile(name=path.name, folder=source, file=file)
        carry(side, locate("s3://bench/base"))


def _round(number: int, adapter: Path, sizes: list[int]) -> dict[str, dict[str, Any]]:
    base, out = "s3://bench/base", f"s3://bench/out-{number}"
    merge = ["merge", base, str(adapter), "--out", out, "--address", "inline"]
    rows = {
        "download": ["download", base],
        "upload": ["upload", f"s3://bench/up-{number}", *map(str, sizes)],
        "copy": ["copy", base, f"s3://bench/copy-{number}"],
        "merge": ["raymeld", *merge, "--verify", "structure", "--quiet"],
    }
    return one_round(number, rows, TITLES)


def _table(runs: list[dict[str, dict[str, Any]]], size: int) -> list[str]:
    lines = ["| " + " | ".join(HEADINGS) + " |", "|---|" + "--:|" * (len(HEADINGS) - 1)]
    for name, title in TITLES.items():
        mine = [run[name] for run in runs]
        seconds = median(one["seconds"] for one in mine)
        slower = median(
            max(run["download"]["seconds"], run["upload"]["seconds"]) / run[name]["seconds"]
            for run in runs
        )
        copy = median(run["copy"]["seconds"] / run[name]["seconds"] for run in runs)
        cells = (
            title,
            f"{seconds:.2f}",
            f"{size / 1e6 / seconds:.0f}",
            f"{slower:.2f}",
            f"{copy:.2f}",
            f"{max(one['peak_memory'] for one in mine) / 1e6:,.0f} MB",
            f"{sum(mine[0]['requests'].values()):,}",
            f"{mine[0]['bytes_read'] / 1e9:.3f} GB",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _notes(runs: list[dict[str, dict[str, Any]]], size: int) -> list[str]:
    merge = runs[0]["merge"]
    beyond = merge["bytes_read"] / size - 1
    listed = ", ".join(f"{count:,} {name}" for name, count in sorted(merge["requests"].items()))
    return [
        f"rounds: {len(runs)}; weights: {size / 1e9:.3f} GB; page cache dropped before each run",
        "x slower: throughput over that of the slower of plain download and plain upload",
        "x copy: throughput over that of both at once; medians of the rounds' ratios",
        f"requests of a merge: {listed}",
        f"read beyond the need: {beyond:.2%}",
    ]


def _about_link(link: float) -> str:
    where = "the server runs on the same cores"
    return f"{where}, behind a link of {link:g} MB/s each way" if link else where


if __name__ == "__main__":
    main()

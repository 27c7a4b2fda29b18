"""Merges, one after another, whose processes are killed at random: is anything ever lost?

    python benchmarks/chaos.py --rounds 200 --seed 1 --results

Every round merges a small checkpoint on a cluster of several nodes, all on this machine. Workers,
collectors, drivers and raylets are killed, nodes drained and memory refused wherever a generator
says: at the n-th call of some function, never after some time, so that ``--seed`` and ``--first``
bring a round back. The command of a driver that was killed is given again until it ends. After each
round the result must be that of a merge that nobody disturbed, and nothing else may be left.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime as dt
import json
import os
import shlex
import signal
import statistics
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import machine
from measure import MemoryWatch

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent / "tests"))  # whose clusters and deaths these are

if TYPE_CHECKING:
    from soak import Round


def summary(rounds: Sequence[Round], peak: int) -> dict[str, Any]:
    """The rounds in numbers."""
    happened: Counter[str] = Counter()
    for one in rounds:
        happened.update(one.happened)
    seconds = [one.seconds for one in rounds]
    return {
        "rounds": len(rounds),
        "lost": 0,
        "planned": sum(one.planned for one in rounds),
        "happened": dict(sorted(happened.items())),
        "runs of the command": sum(one.runs for one in rounds),
        "retries of a shard or check": sum(one.retried for one in rounds),
        "collectors started again": sum(one.collectors for one in rounds),
        "shards resumed": sum(one.resumed for one in rounds),
        "seconds": round(sum(seconds), 1),
        "median seconds a round": round(statistics.median(seconds), 1),
        "peak memory of all processes, MB": round(peak / 1e6),
    }


def markdown(facts: dict[str, str], numbers: dict[str, Any], date: str) -> str:
    """For benchmarks/results/."""
    words = {**numbers, "happened": ", ".join(f"{v} {k}" for k, v in numbers["happened"].items())}
    lines = [f"- {key}: {value}" for key, value in facts.items()]
    rows = [f"| {key} | {value} |" for key, value in words.items()]
    note = "Kills by victim; after each round: equal bytes, no file, process or token left."
    head = ["|  |  |", "|---|--:|"]
    return "\n".join([f"# Chaos, {date}", "", *lines, "", *head, *rows, "", f"- {note}", ""])


def main() -> None:
    from soak import LostError, soak

    options = _options()
    date = dt.datetime.now(dt.UTC).date().isoformat()
    rounds: list[Round] = []
    with soak(options.seed) as place:
        facts = {**machine.describe(Path("/tmp")), "command": f"python {shlex.join(sys.argv)}"}
        watch = MemoryWatch(os.getpid(), interval=1.0)
        try:
            for number in range(options.first, options.first + options.rounds):
                # nohup leaves no other way to stop, and each new node puts Ray's handler there
                signal.signal(signal.SIGTERM, signal.default_int_handler)
                rounds.append(place.round(number))
                print(json.dumps(dataclasses.asdict(rounds[-1])), file=sys.stderr, flush=True)
        except LostError as error:
            sys.exit(f"error: {error}")
        except KeyboardInterrupt:
            print(f"stopped after {len(rounds)} rounds", file=sys.stderr)
        watch.finished.set()
    numbers = summary(rounds, watch.tree_pss)
    print(json.dumps(numbers, indent=1))
    if options.results:
        name = f"chaos_{machine.hardware_name(facts)}_{date}"
        each = [dataclasses.asdict(one) for one in rounds]
        document = {"date": date, "machine": facts, **numbers, "each": each}
        (HERE / "results" / f"{name}.md").write_text(markdown(facts, numbers, date))
        (HERE / "results" / f"{name}.json").write_text(json.dumps(document, indent=1) + "\n")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=1, help="number of the first round")
    parser.add_argument("--results", action="store_true", help="write to benchmarks/results")
    return parser.parse_args()


if __name__ == "__main__":
    main()

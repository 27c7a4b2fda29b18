"""When which worker was at what, how fast it all went, and in how much memory."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.report.evidence import Evidence, Row
from cluster.report.tables import Column, Table, rounded

_PHASES = {"proving": "proven", "merging": "merged", "verifying": "verified"}
"""What is said of a bar by the phase that it belongs to, if it ended well."""

_OUTCOMES = {"failed": "failed", "lost": "worker lost", "released": "let go"}

_NUMBER = re.compile(r"\d+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """What a worker was at, from when to when, in seconds since its run began."""

    worker: str
    """Its name and host."""
    what: str
    outcome: str
    """``merged``, ``proven``, ``verified``, ``failed``, ``worker lost`` or ``let go``."""
    began: float
    ended: float
    why: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunTimeline:
    """The time line of one run."""

    title: str
    began: float
    """Seconds since the epoch."""
    seconds: float
    phases: tuple[tuple[str, float, float], ...]
    """Name, beginning and end."""
    workers: tuple[str, ...]
    bars: tuple[Bar, ...]
    rates: tuple[tuple[str, tuple[tuple[float, float], ...]], ...]
    """Of each phase its name, and points: seconds since the run began, bytes a second."""


def timelines(evidence: Evidence) -> list[RunTimeline]:
    """One a run that did anything; of old merges one alone, if receipts tell when shards began."""
    if not evidence.runs:
        return [_without_history(evidence.shards)] if evidence.shards else []
    found = []
    for number, run in enumerate(evidence.runs, 1):
        began, ended = run["began"], run["ended"] or run["written"]
        mine = [
            shard
            for shard in evidence.shards
            if began <= shard["started"] and _is_before_next(shard, evidence.runs, number)
        ]
        ended = max([ended, *(shard["started"] + shard["seconds"] for shard in mine)])
        bars, phases = [*_merged(mine, began), *_attempts(run, began)], _phases(run, mine)
        found.append(
            RunTimeline(
                title=f"Run {number} of {len(evidence.runs)}",
                began=began,
                seconds=ended - began,
                phases=tuple(
                    (phase["phase"], phase["began"] - began, phase["ended"] - began)
                    for phase in phases
                ),
                workers=_in_order(bar.worker for bar in bars),
                bars=tuple(sorted(bars, key=lambda bar: bar.began)),
                rates=tuple(_rates(phases, run["samples"], began)),
            )
        )
    return found


def _is_before_next(shard: Row, runs: Sequence[Mapping[str, Any]], number: int) -> bool:
    return number == len(runs) or bool(shard["started"] < runs[number]["began"])


def _without_history(shards: Sequence[Row]) -> RunTimeline:
    began = min(shard["started"] for shard in shards)
    bars = list(_merged(shards, began))
    return RunTimeline(
        title="All runs",
        began=began,
        seconds=max(bar.ended for bar in bars),
        phases=(),
        workers=_in_order(bar.worker for bar in bars),
        bars=tuple(sorted(bars, key=lambda bar: bar.began)),
        rates=(),
    )


def _merged(shards: Sequence[Row], began: float) -> Iterator[Bar]:
    for shard in shards:
        start = shard["started"] - began
        yield Bar(
            worker=worker_of(shard),
            what=shard["file"],
            outcome="merged",
            began=start,
            ended=start + shard["seconds"],
            why=f"attempt {shard['attempt']} on {shard['device']}: {shard['lanes']}",
        )


def _attempts(run: Mapping[str, Any], began: float) -> Iterator[Bar]:
    for attempt in run["attempts"]:
        well = _PHASES.get(attempt["phase"], attempt["phase"])
        yield Bar(
            worker=worker_of(attempt),
            what=attempt["task"],
            outcome=_OUTCOMES.get(attempt["outcome"], well),
            began=attempt["began"] - began,
            ended=attempt["ended"] - began,
            why=attempt["why"],
        )


def worker_of(record: Mapping[str, Any]) -> str:
    """What a worker is called: numbers come again in every run, hosts tell more."""
    return f"{record['worker']} on {record['host']}" if record["host"] else str(record["worker"])


def _in_order(workers: Iterable[str]) -> tuple[str, ...]:
    """Each once, worker-10 behind worker-9."""
    by_number = {name: ([int(n) for n in _NUMBER.findall(name)], name) for name in workers}
    return tuple(sorted(by_number, key=lambda name: by_number[name]))


def _phases(run: Mapping[str, Any], merged: Sequence[Row]) -> list[dict[str, Any]]:
    """Those of a run. Where it was stopped nobody told how far it was at the end: shards do."""
    phases = list(run["phases"])
    if run["outcome"] == "stopped" and phases and phases[-1]["phase"] == "merging":
        last = phases[-1]
        done = last["before"] + sum(shard["size"] for shard in merged)
        phases[-1] = {**last, "ended": run["ended"], "done": max(last["done"], done)}
    return phases


def _rates(
    phases: Sequence[Mapping[str, Any]], taken: Sequence[Sequence[Any]], began: float
) -> Iterator[tuple[str, Any]]:
    """Bytes a second between one sample and the next, which are fewer where the pace was slow."""
    for number, phase in enumerate(phases):
        samples = [(when, done) for when, of, done in taken if of == number]
        ends = (phase["began"], phase["before"]), (phase["ended"], phase["done"])
        samples = [ends[0], *samples[:-1], ends[1]]  # the last one and the end are too close
        points = [
            (rounded(when - began), rounded(max(0.0, (done - before) / (when - since))))
            for (since, before), (when, done) in itertools.pairwise(samples)
            if when > since
        ]
        if points:  # the first interval has a beginning too
            first = (rounded(phase["began"] - began), points[0][1])
            yield phase["phase"], (first, *points)


def bar_table(lines: Sequence[RunTimeline]) -> Table:
    """Every bar of every run."""
    columns = [
        Column("Run", "number"),
        Column("Worker"),
        Column("What", "name"),
        Column("Outcome", "choice"),
        Column("Began after", "seconds"),
        Column("Took", "seconds"),
        Column("Why or how"),
    ]
    rows = [
        [
            number,
            bar.worker,
            bar.what,
            bar.outcome,
            rounded(bar.began),
            rounded(bar.ended - bar.began),
            bar.why,
        ]
        for number, line in enumerate(lines, 1)
        for bar in line.bars
    ]
    return Table(columns=columns, rows=rows)


def memory_table(shards: Sequence[Row]) -> Table:
    """What each worker took at most, and could have taken; in all runs."""
    columns = [
        Column("Worker"),
        Column("Device"),
        Column("Shards", "number"),
        Column("Written", "bytes"),
        Column("Busy", "seconds"),
        Column("Memory, peak", "bytes"),
        Column("Memory, limit", "bytes"),
        Column("VRAM, peak", "bytes"),
        Column("VRAM, limit", "bytes"),
    ]
    groups: dict[tuple[str, str], list[Row]] = {}
    for shard in shards:
        groups.setdefault((worker_of(shard), shard["device"]), []).append(shard)
    names = _in_order(worker for worker, _ in groups)
    rows = [
        [
            worker,
            device,
            len(mine),
            sum(shard["size"] for shard in mine),
            rounded(math.fsum(shard["seconds"] for shard in mine)),
            _most(mine, "peak_memory"),
            _least(mine, "memory_limit"),
            _most(mine, "peak_vram"),
            _least(mine, "vram_limit"),
        ]
        for (worker, device), mine in sorted(groups.items(), key=lambda g: names.index(g[0][0]))
    ]
    return Table(columns=columns, rows=rows)


def _most(shards: Sequence[Row], name: str) -> int | None:
    return max((shard[name] for shard in shards if shard.get(name) is not None), default=None)


def _least(shards: Sequence[Row], name: str) -> int | None:
    return min((shard[name] for shard in shards if shard.get(name) is not None), default=None)

"""What was merged into what, and how that ended: the head of the report."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from cluster.console import gb
from cluster.estimate_report import duration
from cluster.report.changes import whole_change
from cluster.report.evidence import Evidence
from merge_core.errors import counted
from merge_core.progress import INTERRUPTED
from merge_core.stages import layers_among
from merge_core.stores.location import locate


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How the merge ended, or where it is."""

    tone: str
    """``good``, ``bad`` or ``open``."""
    title: str
    text: str
    """What follows from it, or why."""


@dataclass(frozen=True, slots=True)
class Fact:
    """A line of a list: what it is, and what it says."""

    label: str
    text: str
    notes: tuple[str, ...] = ()
    """What is said below, of less weight."""


def outcome(evidence: Evidence) -> Outcome:
    """How the merge ended."""
    status, run = evidence.status, evidence.last_run
    done = f"{status.done} of {counted(status.shards, 'shard')} done"
    if status.state == "finished":
        return _finished(evidence.verified)
    if status.state == "running":
        return Outcome(tone="open", title="Running", text=f"{done}, by {status.holder}.")
    if run.get("outcome") == "done":
        text = f"{done}; left to other stages: --layers {status.missing}."
        return Outcome(tone="open", title="Done with a stage", text=text)
    go_on = "The same command again goes on from here."
    if run.get("verification") and run["verification"]["findings"]:
        failed = counted(len(run["verification"]["findings"]), "check")
        text = f"{failed} failed: nothing was published. {go_on}"
        return Outcome(tone="bad", title="Verification failed", text=text)
    why = run.get("error", "").rstrip(".")
    if why in ("", INTERRUPTED):  # who is killed tells nobody
        title = "Interrupted" if why else "Stopped"
        return Outcome(tone="bad", title=title, text=f"{done}. {go_on}")
    text = f"{done}. {why}. Once that is mended, the same command again goes on from here."
    return Outcome(tone="bad", title="Failed", text=text)


def _finished(verified: Mapping[str, Any] | None) -> Outcome:
    if verified is None:
        return Outcome(tone="open", title="Merged", text="What was verified is not known.")
    checks = counted(len(verified["checks"]), "kind")
    text = f"Level {verified['level']}: {checks} of check, all passed."
    return Outcome(tone="good", title="Merged and verified", text=text)


def figures(evidence: Evidence) -> Iterator[tuple[str, str]]:
    """The numbers that people look for first: value, and what it is."""
    merged = sum(row["action"] == "merged" for row in evidence.tensors)
    yield f"{merged:,}", f"tensors merged, of {evidence.planned:,}"
    size = sum(shard["size"] for shard in evidence.plan["shards"])
    yield gb(size), f"in {counted(len(evidence.plan['shards']), 'file')}"
    change = whole_change(evidence.tensors)
    if change is not None:
        yield f"{change:.2%}", "relative change of what was merged"
    seconds = sum((run["ended"] or run["written"]) - run["began"] for run in evidence.runs)
    if evidence.runs:
        took = duration(seconds) if seconds >= 10 else f"{seconds:.1f} seconds"
        yield took, f"in {counted(len(evidence.runs), 'run')}"
    workers = {(shard["worker"], shard["host"]) for shard in evidence.shards}
    if workers:
        hosts = {host for _, host in workers}
        what = "worker" if len(workers) == 1 else "workers"
        yield f"{len(workers)}", f"{what} on {counted(len(hosts), 'machine')}"
    troubles = Counter(attempt["outcome"] for attempt in evidence.attempts)
    if evidence.runs:
        yield f"{troubles['failed'] + troubles['lost']}", "attempts failed or lost"


def inputs(evidence: Evidence) -> Iterator[Fact]:
    """What was merged into what, by whom, and how."""
    plan, run = evidence.plan, evidence.last_run
    kinds = plan.get("architectures")
    kind = f"{kinds[0]}, " if isinstance(kinds, list) and kinds else ""
    files = [f"{name}, {size:,} bytes" for name, size, _ in plan["inputs"]]
    headers = [f"header {digest}" for digest in plan.get("header_digests", ())]
    yield Fact("Base", f"{kind}{plan['base']}", (*files, *headers))
    for number, adapter in enumerate(plan["adapters"], 1):
        name = f"Adapter {number}" if len(plan["adapters"]) > 1 else "Adapter"
        what = f"{adapter['path']}, weight {adapter['weight']:g}"
        kind = f"{adapter['peft_type']}, " if "peft_type" in adapter else ""
        yield Fact(name, kind + what, tuple(_identity(adapter)))
    yield Fact("Result", str(evidence.status.out), tuple(plan.get("notes", ())))
    yield Fact("Fingerprint", str(plan["fingerprint"]), ("of everything that decides a byte",))
    yield Fact("Recipe", ", ".join(_recipe(plan)))
    if run:
        yield Fact("Run with", ", ".join(f"{k} {v}" for k, v in run["options"].items() if v))
        yield Fact("Versions", ", ".join(f"{k} {v}" for k, v in run["versions"].items()))
        yield Fact("Driver", f"process {run['pid']} on {run['host']}, {clock(run['began'])}")
    else:
        yield Fact("Versions", f"raymeld {plan['raymeld']}")


def _identity(adapter: Mapping[str, Any]) -> Iterator[str]:
    if "file" in adapter:
        yield f"{adapter['file']['name']}, {adapter['file']['size']:,} bytes"
        yield f"{counted(len(adapter['tensors']), 'tensor')}, each with a digest in the plan"


def _recipe(plan: Mapping[str, Any]) -> Iterator[str]:
    """The options that decide bytes, as far as the plan keeps them."""
    combination = {k: v for k, v in plan.get("combination", {}).items() if v is not None}
    yield f"combine {combination.pop('method', 'sum')}"
    yield from (f"{name.replace('_', ' ')} {value}" for name, value in combination.items())
    dtypes = Counter(t["target"]["dtype"] for s in plan["shards"] for t in s["tasks"])
    yield f"written as {' and '.join(sorted(dtypes))}"
    devices = sorted({str(shard["device"]) for shard in plan["shards"] if shard.get("device")})
    if devices:
        yield f"a device map with {' and '.join(devices)}"
    for name in ("keep_tied", "simulate_nf4"):
        if plan.get(name):
            yield name.replace("_", " ")
    for name, value in plan.get("config_changes", {}).items():
        yield f"config.json: {name} {'removed' if value is None else f'= {json.dumps(value)}'}"


def gaps(evidence: Evidence) -> Iterator[str]:
    """What is not known of this merge, and why."""
    if not evidence.runs:
        yield "It kept no history of its runs: phases, failures and decisions are not known."
    if not evidence.shards and evidence.tensors:
        yield "Its ledger does not tell when which shard was merged."
    missing = evidence.planned - len(evidence.tensors)
    if missing:
        left = {task["target"]["name"] for task in evidence.tasks}
        left -= {row["tensor"] for row in evidence.tensors}
        layers = layers_among(left)
        what = f"{counted(missing, 'tensor')} not merged yet (--layers {layers})"
        yield f"{what}: nothing below speaks of them."


def title(evidence: Evidence) -> str:
    """``my-lora into Qwen1.5-7B``."""
    adapters = " + ".join(locate(adapter["path"]).name for adapter in evidence.plan["adapters"])
    return f"{adapters} into {locate(evidence.plan['base']).name}"


def clock(when: float) -> str:
    """A time as people write it, in UTC: the report is read elsewhere."""
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(when))

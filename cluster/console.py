"""What a person reads: answers on stdout, and errors in one paragraph."""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from cluster.explain import (
    adapter_documents,
    adapter_lines,
    config_document,
    config_lines,
    counts_of,
    summary,
)
from cluster.folding import fold
from cluster.log_lines import log, logs_json
from cluster.pools import EligiblePool
from cluster.stderr import Stderr
from merge_core.errors import RaymeldError, counted
from merge_core.ledger import TensorRecord
from merge_core.merge import MergeResult
from merge_core.plan import MergePlan
from merge_core.shards import layer_of
from merge_core.stages import layers_of
from merge_core.verify import VerifyReport


def answer(lines: Iterable[str], document: dict[str, Any], *, as_json: bool) -> None:
    """Print the answer on stdout: ``lines`` for people, or ``document`` as JSON."""
    _print(json.dumps(document, indent=2) if as_json else "\n".join(map(_fitting, lines)))


def _fitting(line: str) -> str:
    """As wide as the terminal, if stdout is one."""
    if sys.stdout is None or not sys.stdout.isatty():
        return line
    return fold(line, shutil.get_terminal_size().columns)


def complain(error: RaymeldError, *, as_json: bool, out: object | None = None) -> None:
    """Say what went wrong (with ``out``, if anything) on stderr; with JSON on stdout as well."""
    if logs_json():
        log(str(error), level="error", exit_code=error.exit_code, out=out)
    else:
        Stderr().print(f"[bold red]error[/]: {_escaped(str(error))}", soft_wrap=True)
    if as_json:
        document = {"ok": False, "error": str(error), "exit_code": error.exit_code}
        _print(json.dumps(document, indent=2))


def _print(text: str) -> None:
    """Print on stdout, where there is one that somebody reads.

    Raises:
        RaymeldError: it cannot be written to.
    """
    if sys.stdout is None:  # closed by who started us
        return
    try:
        print(text, flush=True)
    except OSError as error:
        with open(os.devnull, "w") as nowhere:  # or Python tries once more at exit
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):  # that one has read what it wanted
            raise RaymeldError(
                f"what was asked for is done, but its answer cannot be written ({error.strerror})",
                "stdout",
                "Send it elsewhere.",
            ) from error


def plan_lines(
    plan: MergePlan, pools: Sequence[EligiblePool], there: frozenset[int] = frozenset()
) -> list[str]:
    """The plan as a person reads it.

    Args:
        there: the shards that OUT holds already.
    """
    named = plan.config.get("architectures")
    kind = named[0] if isinstance(named, list) and named else "unknown architecture"
    read, size = (sum(f.size for f in files) for files in (plan.base_files, plan.shards))
    parts, files = (counted(len(files), "file") for files in (plan.base_files, plan.shards))
    return [
        f"base     {plan.base}: {kind}, {parts}, {gb(read)}",
        *adapter_lines(plan),
        f"result   {files}, {gb(size)}: {summary(plan)}",
        *config_lines(plan),
        *_pinned_lines(plan),
        *_stage_lines(plan, there),
        *(f"pool     {p.name}: {'' if p.eligible else 'not eligible: '}{p.reason}" for p in pools),
        *(f"note     {note}" for note in plan.notes),
    ]


def _stage_lines(plan: MergePlan, there: frozenset[int]) -> list[str]:
    """What a stage makes, what others have made, and what it leaves to others."""
    now = plan.stage - there
    later = {shard.index for shard in plan.shards} - plan.stage - there
    if not later and not there:
        return []
    files = counted(len(plan.shards), "file")
    return [
        f"stage    {len(now)} of {files} now" + f": {layers_of(plan, now)}" * bool(now),
        *[f"there    {counted(len(there), 'file')}: {layers_of(plan, there)}"] * bool(there),
        *[f"deferred {counted(len(later), 'file')}: {layers_of(plan, later)}"] * bool(later),
    ]


def _pinned_lines(plan: MergePlan) -> list[str]:
    """What a device map makes of it."""
    if not plan.pinned:
        return []
    counts = Counter(shard.device or "any device" for shard in plan.shards)
    parts = [f"{counted(n, 'file')} on {device}" for device, n in sorted(counts.items())]
    return [f"devices  {', '.join(parts)}"]


def plan_document(
    plan: MergePlan, pools: Sequence[EligiblePool], there: frozenset[int] = frozenset()
) -> dict[str, Any]:
    """The plan as programs read it, see ``plan_lines``."""
    return {
        "ok": True,
        "base": str(plan.base),
        "adapters": adapter_documents(plan),
        "tensors": counts_of(plan),
        "bytes": sum(shard.size for shard in plan.shards),
        "shards": [
            {
                "name": shard.name,
                "bytes": shard.size,
                "device": shard.device,
                "there": shard.index in there,
                "deferred": shard.index not in plan.stage | there,
                "tensors": len(shard.tasks),
                "merged": sum(task.action == "merged" for task in shard.tasks),
            }
            for shard in plan.shards
        ],
        "pools": [{"name": p.name, "eligible": p.eligible, "reason": p.reason} for p in pools],
        "config_changes": config_document(plan),
        "notes": list(plan.notes),
    }


def result_lines(result: MergeResult, plan: MergePlan) -> list[str]:
    """What a merge did, as a person reads it."""
    if not result.receipts:
        here = f"{result.url or result.out} already holds this merge ({result.fingerprint[:12]})"
        return [f"{here}; nothing done", *_verified_lines(result)]
    size, plan_id = sum(receipt.size for receipt in result.receipts), result.fingerprint[:12]
    merged = counted(sum(t.action == "merged" for t in _tensors(result)), "tensor")
    return [
        *(f"{layers}: {where}" for layers, where in device_map(result, plan)),
        f"merged   {merged}, {gb(size)} in {result.seconds:.1f} s, plan {plan_id}",
        *[f"resumed  {counted(result.resumed, 'shard')} of an earlier run, proven"]
        * (result.resumed > 0),
        *_change_lines(result),
        *config_lines(plan),
        *(f"note     {note}" for note in plan.notes),
        *_verified_lines(result),
        *_deferred_lines(result, plan),
        *[f"result   {result.url or result.out}"] * (not result.deferred),
    ]


def _verified_lines(result: MergeResult) -> list[str]:
    report = result.verified
    return [f"verified {report.level}: {'; '.join(report.checks)}"] if report else []


def _deferred_lines(result: MergeResult, plan: MergePlan) -> list[str]:
    """What other stages are left to do."""
    if not result.deferred:
        return []
    layers, files = layers_of(plan, result.deferred), counted(len(result.deferred), "file")
    return [
        f"deferred {files}: {layers}; until they are merged {result.out} is no checkpoint",
        f"next     the same command with --layers {layers}, or without --layers",
    ]


def _change_lines(result: MergeResult) -> list[str]:
    """By how much the weights changed: an adapter that was never trained shows here."""
    rows = [(t.relative_change, t) for t in _tensors(result)]
    changes = [(change, row) for change, row in rows if change is not None]
    if not changes:
        return []
    most, where = max((change, row.tensor) for change, row in changes)
    idle = sum(change == 0 for change, _ in changes)
    deltas, bases = zip(*((row.delta_norm, row.base_norm) for _, row in changes), strict=True)
    whole = math.hypot(*deltas) / math.hypot(*bases)
    return [
        f"changed  by {whole:.2%} of their norm, most in {where}: {most:.2%}",
        *[f"note     {counted(idle, 'tensor')} did not change: the delta is zero"] * (idle > 0),
    ]


def _tensors(result: MergeResult) -> list[TensorRecord]:
    return [tensor for receipt in result.receipts for tensor in receipt.tensors]


def result_document(result: MergeResult, plan: MergePlan) -> dict[str, Any]:
    """What a merge did, as programs read it."""
    verified = result.verified
    return {
        "ok": True,
        "out": str(result.out),
        "url": result.url,
        "fingerprint": result.fingerprint,
        "already_there": not result.receipts,
        "resumed": result.resumed,
        "deferred": [plan.shards[index].name for index in result.deferred],
        "bytes": sum(there.size for there in result.receipts or plan.shards),
        "seconds": result.seconds,
        "device_map": dict(device_map(result, plan)),
        "config_changes": config_document(plan),
        "notes": list(plan.notes),
        "verified": report_document(verified) if verified is not None else None,
    }


def report_lines(report: VerifyReport) -> list[str]:
    """A verification as a person reads it."""
    size, seconds = gb(report.bytes_read), report.seconds
    files, tensors = counted(report.files, "file"), counted(report.tensors, "tensor")
    state = "ok" if report.ok else f"{counted(len(report.findings), 'check')} failed"
    return [
        *(f"failed   {finding}" for finding in report.findings),
        f"verified {report.out} at level {report.level}: {state}",
        f"read     {files}, {tensors}, {size} in {seconds:.1f} s",
        *(f"checked  {check}" for check in report.checks),
    ]


def report_document(report: VerifyReport) -> dict[str, Any]:
    """A verification as programs read it."""
    from merge_core.verdict import describe_report

    return {"out": str(report.out), **describe_report(report)}


def device_map(result: MergeResult, plan: MergePlan) -> list[tuple[str, str]]:
    """Which layers were merged where, runs of layers on one device joined."""
    where = {r.shard: f"{r.device} on {r.host} ({r.worker})" for r in result.receipts}
    places = [
        (layer_of(task.target.name), where[shard.index])
        for shard in plan.shards
        if shard.index in where
        for task in shard.tasks
    ]
    rows = []
    ordered = sorted({p for p in places if p[0] is not None}, key=lambda p: (p[0] or 0, p[1]))
    for place, run in itertools.groupby(ordered, key=lambda p: p[1]):
        layers = [layer for layer, _ in run if layer is not None]
        span = f"{layers[0]}-{layers[-1]}" if len(layers) > 1 else f"{layers[0]}"
        rows.append((f"layers {span}", place))
    others = sorted({place for layer, place in places if layer is None})
    return rows + [("embeddings, final norm and head", "; ".join(others))] * bool(others)


def gb(nbytes: int) -> str:
    """``7.90 GB``; small amounts in MB."""
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 10_000_000 else f"{nbytes / 1e6:.2f} MB"


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)

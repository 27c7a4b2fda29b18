"""Merges that nobody did: what OUT would hold of one, of any size, with failures and all."""

from __future__ import annotations

import dataclasses
import json
import math
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from handmade import Geometry, write_json

from merge_core.layout import tensor_bytes
from merge_core.ledger import Receipt, TensorRecord, fold_ledger
from merge_core.output import describe
from merge_core.plan import MergePlan, TensorTask
from merge_core.planner import make_plan

QWEN_72B = Geometry(
    hidden=8192, inner=24576, heads=64, kv_heads=64, layers=80, vocab=152064, tied=False
)
BEGAN = 1_790_000_000.0


def hollow_plan(path: Path, geometry: Geometry, rank: int = 16, **options: Any) -> MergePlan:
    """A base and an adapter on every linear layer, of holes, planned and as if sealed."""
    base, adapter = path / "Qwen1.5-72B", path / "my-lora"
    for each in (base, adapter):
        each.mkdir(parents=True)
    write_json(base / "config.json", geometry.config)
    write_json(
        adapter / "adapter_config.json", {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank}
    )
    factors: dict[str, tuple[int, ...]] = {}
    for module, (rows, width) in geometry.linear.items():
        factors[f"base_model.model.{module}.lora_A.weight"] = (rank, width)
        factors[f"base_model.model.{module}.lora_B.weight"] = (rows, rank)
    _hollow(base / "model.safetensors", geometry.shapes, "BF16")
    _hollow(adapter / "adapter_model.safetensors", factors, "F32")
    return as_sealed(make_plan(base, [adapter], **options))


def as_sealed(plan: MergePlan) -> MergePlan:
    """With digests that nobody worked out."""
    draw = random.Random(0)
    adapters = []
    for number, adapter in enumerate(plan.adapters):
        names = {t.name for task in plan.tasks for u in task.parts for t in u.tensors}
        digests = {name: f"{draw.getrandbits(128):032x}" for name in sorted(names)}
        adapters.append(dataclasses.replace(adapter, digests=digests, weight=1.0 - number / 2))
    return dataclasses.replace(plan, adapters=tuple(adapters))


def play(plan: MergePlan, out: Path, workers: int, *, finished: bool = True) -> Path:
    """What ``out`` holds after a merge of ``plan``, or in the middle of one."""
    state, draw = out / ".raymeld", random.Random(1)
    (state / "runs").mkdir(parents=True)
    write_json(state / "plan.json", describe(plan))
    receipts = list(_receipts(plan, workers, draw))
    done = receipts if finished else receipts[: len(receipts) // 2]
    end = max(receipt.started + receipt.seconds for receipt in done)
    write_json(state / "runs" / "a.json", _run(plan, done, end, finished, draw))
    if not finished:
        (state / "receipts").mkdir()
        for receipt in done:
            name = f"shard-{receipt.shard:05}.json"
            (state / "receipts" / name).write_bytes(receipt.to_json())
        return out
    files = {shard.index: shard.name for shard in plan.shards}
    ledger = fold_ledger(done, files, {"files": {}, "written": end})
    (state / "ledger.parquet").write_bytes(ledger)
    write_json(state / "verified.json", _verification(plan))
    write_json(out / "config.json", plan.config)
    return out


def _receipts(plan: MergePlan, workers: int, draw: random.Random) -> Iterator[Receipt]:
    fingerprint = plan.fingerprint
    free = [BEGAN + 20 + draw.random() * 30 for _ in range(workers)]
    for shard in plan.shards:
        worker = min(range(workers), key=free.__getitem__)
        seconds = shard.size / 1e8 * (0.8 + draw.random())
        yield Receipt(
            fingerprint=fingerprint,
            shard=shard.index,
            attempt=1 + (shard.index % 9 == 3),
            part=f"{shard.name}.part",
            size=shard.size,
            worker=f"worker-{worker}",
            host=f"gpu-node-{worker // 8:02}.cluster.example",
            device="NVIDIA H200",
            started=free[worker],
            seconds=seconds,
            lanes="8 lanes of 8 MiB reads need 1,200 MB of memory and 900 MB of VRAM",
            peak_memory=int(1.4e9 + draw.random() * 4e8),
            peak_vram=int(0.9e9 + draw.random() * 2e8),
            memory_limit=110_000_000_000,
            vram_limit=139_000_000_000,
            tensors=tuple(_record(task, draw) for task in shard.tasks),
        )
        free[worker] += seconds


def _record(task: TensorTask, draw: random.Random) -> TensorRecord:
    target, merged = task.target, task.action == "merged"
    base = draw.uniform(50, 150)
    return TensorRecord(
        tensor=target.name,
        action=task.action,
        dtype=target.dtype,
        shape=target.shape,
        nbytes=target.nbytes,
        digest=f"{draw.getrandbits(128):032x}",
        bytes_read=task.source.bytes_read,
        bytes_written=target.nbytes,
        read_seconds=draw.random(),
        merge_seconds=draw.random(),
        write_seconds=draw.random(),
        base_norm=base if merged else None,
        delta_norm=base * draw.lognormvariate(-4, 0.6) if merged else None,
        largest_change=draw.random() / 100 if merged else None,
    )


def _run(
    plan: MergePlan, done: list[Receipt], end: float, finished: bool, draw: random.Random
) -> dict[str, Any]:
    total = sum(shard.size for shard in plan.shards)
    phases = [_phase("merging", BEGAN + 20, end, total if finished else total // 2, total)]
    if finished:
        phases.append(_phase("verifying", end, end + 40, total, total))
    return {
        "run": "0" * 32,
        "host": "head.cluster.example",
        "pid": 4711,
        "versions": {"raymeld": "0.1.0", "python": "3.11.7", "torch": "2.13.0", "ray": "2.60.0"},
        "options": {"address": "head:6379", "device": "auto", "workers": 64, "verify": "digest"},
        "began": BEGAN,
        "ended": phases[-1]["ended"],
        "written": phases[-1]["ended"],
        "outcome": "done" if finished else "stopped",
        "error": "" if finished else "worker-3: the disk is gone. Mend it",
        "phases": phases,
        "samples": [sample for number in range(len(phases)) for sample in _pace(phases, number)],
        "attempts": list(_attempts(plan, done, end if finished else None, draw)),
        "lines": [(BEGAN + 20 + n, f"worker-{n} is NVIDIA H200 on somewhere") for n in range(64)],
        "verification": _verification(plan) if finished else None,
    }


def _phase(name: str, began: float, ended: float, done: int, total: int) -> dict[str, Any]:
    times = {"began": began, "ended": ended}
    return {"phase": name, **times, "before": 0, "done": done, "total": total}


def _pace(phases: list[dict[str, Any]], number: int) -> Iterator[tuple[float, int, float]]:
    """A sample a second, slower and faster by turns."""
    phase = phases[number]
    seconds = phase["ended"] - phase["began"]
    for step in range(1, int(seconds)):
        share = (step + 0.4 * math.sin(step)) / seconds
        yield phase["began"] + step, number, share * phase["done"]


def _attempts(
    plan: MergePlan, done: list[Receipt], verified: float | None, draw: random.Random
) -> Iterator[Mapping[str, Any]]:
    for receipt in done:
        who = {"worker": receipt.worker, "host": receipt.host}
        name = plan.shards[receipt.shard].name
        if receipt.attempt > 1:
            lost = receipt.shard % 2 == 0
            yield {
                **who,
                "phase": "merging",
                "task": name,
                "began": receipt.started - 9,
                "ended": receipt.started,
                "outcome": "lost" if lost else "failed",
                "why": "its node died" if lost else "CUDA out of memory on gpu-3",
            }
        if verified is not None:
            began = verified + draw.random() * 20
            times = {"began": began, "ended": began + 10}
            task = {"phase": "verifying", "task": f"check of {name}"}
            yield {**who, **task, **times, "outcome": "done", "why": ""}


def _verification(plan: MergePlan) -> dict[str, Any]:
    size = sum(shard.size for shard in plan.shards)
    return {
        "level": "digest",
        "ok": True,
        "checks": [
            "config, index, headers, offsets, sizes and the list of files",
            "names, dtypes, shapes and sizes against the ledger",
            "every byte of every file read back and its digest compared with the ledger",
        ],
        "findings": [],
        "files": len(plan.shards),
        "tensors": sum(len(shard.tasks) for shard in plan.shards),
        "bytes_read": size,
        "seconds": 40.0,
    }


def _hollow(path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: str) -> None:
    """A safetensors file whose values are a hole: headers are all that planning reads."""
    header, at = {}, 0
    for name, shape in shapes.items():
        size = tensor_bytes(dtype, shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)

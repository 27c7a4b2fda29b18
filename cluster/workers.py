"""How many workers a merge takes, and what each asks of Ray."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from actors.collector import Collector
from actors.merger import Merger
from actors.pool import WorkerOptions
from cluster.crew import WorkerKind
from cluster.session import LOCAL
from merge_core.errors import InputError, Problem, refuse

CPUS_A_WORKER = 4
"""What the lanes of a CPU worker keep busy at most, while the others wait for the disk."""


CPU_HANDICAP = 4.0
"""How many times longer a shard is expected to take on a CPU worker than on the GPU workers beside
it, until both have been timed. A guess: where the disk sets the pace it is less."""

CPUS_OF_A_NODE_TO_COME = 2
"""Asked for while no node is up: every machine that is worth starting has as many."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterOptions:
    """Where and with how many workers to merge; changes no byte of the result."""

    address: str
    """A cluster's address, or ``local``."""
    device: str = "auto"
    workers: int | None = None
    """None: one a GPU, or one for every four CPUs of a node."""
    cpu_workers: int = 0
    """CPU workers that stand beside the GPU workers and take from the same queue."""
    gpus_per_worker: float = 1.0
    start_timeout: float = 1800.0
    """Seconds without any worker of a kind after which nobody waits for it; a cloud may take ten
    minutes to launch a GPU node, and try more than one zone."""
    merger: type[Merger] = Merger
    collector: type[Collector] = Collector
    """The actors' classes; tests inject faults by subclassing them."""

    @property
    def chosen(self) -> dict[str, Any]:
        """What a person can choose, by name."""
        fields = (field.name for field in dataclasses.fields(self))
        return {name: getattr(self, name) for name in fields if name not in ("merger", "collector")}


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    """Every kind of worker of a merge, the fastest first."""

    workers: tuple[WorkerOptions, ...]
    """What each asks of Ray."""
    kinds: tuple[WorkerKind, ...]
    """How many of each; in the same order."""

    @property
    def lines(self) -> list[str]:
        """What a person wants to know before they start."""
        return [
            f"workers: at most {kind.most} on {worker.device},"
            f" each with {amounts(worker.resources)}"
            for worker, kind in zip(self.workers, self.kinds, strict=True)
        ]


def size_fleet(
    options: ClusterOptions,
    nodes: Sequence[Mapping[str, float]],
    shards: int,
    pinned: Collection[str] = (),
) -> Fleet:
    """What each worker asks of Ray, and how many there may be.

    Args:
        nodes: resources of the nodes that are up.
        shards: how many there are to do.
        pinned: devices that some shards ask for.

    Raises:
        InputError: none of the nodes could ever hold such a worker, and nothing says that more
            come; options that fight; a shard is pinned to a device that no worker has.
    """
    gpus = [node.get("GPU", 0) for node in nodes]
    cpus = [int(node.get("CPU", 0)) for node in nodes]
    device = options.device
    if device == "auto":
        device = "cuda" if sum(gpus) or (options.workers and not sum(cpus)) else "cpu"
    if device == "cuda":
        kinds = [_gpu_workers(options, gpus)]
        if options.cpu_workers:
            kinds.append(_cpu_workers(options, options.cpu_workers, cpus, CPU_HANDICAP))
    else:
        _refuse_cpu_workers(options)
        kinds = [_cpu_workers(options, options.workers, cpus)]
    problems = [
        *(_no_room(options, worker) for worker, kind in kinds if not kind.ceiling),
        *(_not_there(one, device) for one in sorted({*pinned} - {w.device for w, _ in kinds})),
    ]
    if problems:
        raise InputError(problems)
    return Fleet(
        workers=tuple(worker for worker, _ in kinds),
        kinds=tuple(replace(kind, most=min(kind.most, shards)) for _, kind in kinds),
    )


def _refuse_cpu_workers(options: ClusterOptions) -> None:
    if options.cpu_workers:
        raise refuse(
            "there are no GPU workers that CPU workers could stand beside",
            "--cpu-workers",
            "Count CPU workers with --workers, or wait for GPUs with --device cuda",
        )


def _no_room(options: ClusterOptions, worker: WorkerOptions) -> Problem:
    remedy = "Give --workers to wait for nodes that an autoscaler starts"
    return Problem(
        f"no node that is up can hold a worker with {amounts(worker.resources)}",
        f"--address {options.address}",
        remedy + ", or merge with --device cpu" * (worker.device == "cuda"),
    )


def _not_there(pinned: str, device: str) -> Problem:
    remedy = "Give --cpu-workers" if device == "cuda" else "Merge where there are GPUs"
    what = f"shards are pinned to {pinned}, and all workers are on {device}"
    return Problem(what, "--device-map", f"{remedy}, or another map")


def _gpu_workers(
    options: ClusterOptions, gpus: Sequence[float]
) -> tuple[WorkerOptions, WorkerKind]:
    share = options.gpus_per_worker
    if share > 1 and share != int(share):
        remedy = "Give a whole number, or a fraction below 1"
        raise refuse(f"Ray cannot hand out {share:g} GPUs", "--gpus-per-worker", remedy)
    room = sum(int(found / share + 1e-9) for found in gpus)
    worker = WorkerOptions(device="cuda", resources={"num_gpus": share, "num_cpus": 0})
    return worker, _kind(options, "cuda", options.workers, room)


def _cpu_workers(
    options: ClusterOptions, workers: int | None, cpus: Sequence[int], handicap: float = 1.0
) -> tuple[WorkerOptions, WorkerKind]:
    share = _cpu_share(cpus, workers) if sum(cpus) else CPUS_OF_A_NODE_TO_COME
    room = sum(int(found / share + 1e-9) for found in cpus)
    worker = WorkerOptions(device="cpu", resources={"num_cpus": share, "num_gpus": 0})
    return worker, _kind(options, "cpu", workers, room, handicap)


def _kind(
    options: ClusterOptions, device: str, wanted: int | None, room: int, handicap: float = 1.0
) -> WorkerKind:
    """No more than were asked for; none where there is no room and none can be made.

    In the place of those that are of no use where they are others may come up: there are as many as
    there is room for, and where an autoscaler brings nodes, once more as many as were asked for.
    """
    grows = options.address != LOCAL and wanted is not None
    number = (wanted or room) if room or grows else 0
    ceiling = max(room, number * (2 if grows else 1)) if number else 0
    return WorkerKind(name=device, most=number, ceiling=ceiling, handicap=handicap)


def _cpu_share(cpus: Sequence[int], workers: int | None) -> float:
    """CPUs a worker: the most that leaves room for as many as were asked for, since Ray would
    keep the others waiting for ever.
    """
    wanted = workers or 1
    for share in range(min(CPUS_A_WORKER, max(cpus)), 0, -1):
        if sum(found // share for found in cpus) >= wanted:
            return share
    return 1 / -(-wanted // sum(cpus))  # so many share a CPU: Ray takes fractions below one


def amounts(resources: Mapping[str, float]) -> str:
    """``1 GPU`` or ``2 CPU``, from Ray's names."""
    names = {"num_gpus": "GPU", "num_cpus": "CPU"}
    return " and ".join(f"{amount:g} {names[n]}" for n, amount in resources.items() if amount)

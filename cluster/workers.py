"""How many workers a merge takes, and what each asks of Ray."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from actors.collector import Collector
from actors.merger import Merger
from actors.pool import WorkerOptions
from cluster.session import LOCAL
from merge_core.errors import refuse

CPUS_A_WORKER = 4
"""What the lanes of a CPU worker keep busy at most, while the others wait for the disk."""


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
    gpus_per_worker: float = 1.0
    start_timeout: float = 1800.0
    """Seconds without any worker after which the merge gives up; a cloud may take ten minutes to
    launch a GPU node, and try more than one zone."""
    merger: type[Merger] = Merger
    collector: type[Collector] = Collector
    """The actors' classes; tests inject faults by subclassing them."""


def size_pool(
    options: ClusterOptions, nodes: Sequence[Mapping[str, float]], shards: int
) -> tuple[WorkerOptions, int]:
    """What each worker asks of Ray, and how many there may be.

    Args:
        nodes: resources of the nodes that are up.

    Raises:
        InputError: none of them could ever hold such a worker, and nothing says that more come.
    """
    gpus = [node.get("GPU", 0) for node in nodes]
    cpus = [int(node.get("CPU", 0)) for node in nodes]
    device = options.device
    if device == "auto":
        device = "cuda" if sum(gpus) or (options.workers and not sum(cpus)) else "cpu"
    if device == "cuda":
        resources, room = _gpu_workers(options.gpus_per_worker, gpus)
    else:
        resources, room = _cpu_workers(options.workers, cpus)
    if not room and (not options.workers or options.address == LOCAL):
        raise refuse(
            f"no node that is up can hold a worker with {amounts(resources)}",
            f"--address {options.address}",
            "Give --workers to wait for nodes that an autoscaler starts, or another --device",
        )
    return WorkerOptions(device=device, resources=resources), min(options.workers or room, shards)


def _gpu_workers(share: float, gpus: Sequence[float]) -> tuple[dict[str, float], int]:
    if share > 1 and share != int(share):
        remedy = "Give a whole number, or a fraction below 1"
        raise refuse(f"Ray cannot hand out {share:g} GPUs", "--gpus-per-worker", remedy)
    room = sum(int(found / share + 1e-9) for found in gpus)
    return {"num_gpus": share, "num_cpus": 0}, room


def _cpu_workers(workers: int | None, cpus: Sequence[int]) -> tuple[dict[str, float], int]:
    share = _cpu_share(cpus, workers) if sum(cpus) else CPUS_OF_A_NODE_TO_COME
    room = sum(int(found / share + 1e-9) for found in cpus)
    return {"num_cpus": share, "num_gpus": 0}, room


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

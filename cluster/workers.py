"""How many workers a merge takes, and what each asks of Ray."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from actors.collector import Collector
from actors.merger import Merger
from actors.pool import WorkerOptions
from merge_core.errors import refuse

CPUS_A_WORKER = 4
"""What the lanes of a CPU worker keep busy at most, while the others wait for the disk."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterOptions:
    """Where and with how many workers to merge; changes no byte of the result."""

    address: str
    """A cluster's address, or ``local``."""
    device: str = "auto"
    workers: int | None = None
    """None: one a GPU, or one for every four CPUs of a node."""
    gpus_per_worker: float = 1.0
    merger: type[Merger] = Merger
    collector: type[Collector] = Collector
    """The actors' classes; tests inject faults by subclassing them."""


def size_pool(
    options: ClusterOptions, nodes: Sequence[Mapping[str, float]], shards: int
) -> tuple[WorkerOptions, int]:
    """What each worker asks of Ray, and how many there may be.

    Raises:
        InputError: no node of the cluster could ever hold such a worker.
    """
    gpus = [node.get("GPU", 0) for node in nodes]
    device = options.device
    if device == "auto":
        device = "cuda" if sum(gpus) else "cpu"
    if device == "cuda":
        share = options.gpus_per_worker
        if share > 1 and share != int(share):
            remedy = "Give a whole number, or a fraction below 1"
            raise refuse(f"Ray cannot hand out {share:g} GPUs", "--gpus-per-worker", remedy)
        room = sum(int(found / share + 1e-9) for found in gpus)
        if not room:
            what = f"a worker needs {share:g} GPUs, the nodes have {sorted(gpus)}"
            raise refuse(what, "--gpus-per-worker", "Ask for fewer, or use --device cpu")
        resources = {"num_gpus": share, "num_cpus": 0}
    else:
        cpus = [int(node.get("CPU", 0)) for node in nodes]
        if not sum(cpus):
            remedy = "Start the cluster with CPUs, or use --device cuda"
            raise refuse("no node has a CPU for a worker", f"--address {options.address}", remedy)
        share = _cpu_share(cpus, options.workers)
        room = sum(int(found / share + 1e-9) for found in cpus)
        resources = {"num_cpus": share, "num_gpus": 0}
    most = min(options.workers or room, shards)
    return WorkerOptions(device=device, resources=resources), most


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

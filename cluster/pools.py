"""Which devices of this machine could merge a plan, measured without torch or Ray."""

from __future__ import annotations

from dataclasses import dataclass

from merge_core.errors import DeviceMemoryError
from merge_core.memory import Memory, choose_lanes, free_host_memory
from merge_core.nvidia import Gpu, GpuProcess, list_gpus
from merge_core.plan import MergePlan


@dataclass(frozen=True, slots=True, kw_only=True)
class EligiblePool:
    """One device, and whether a worker fits on it."""

    name: str
    """``cpu``, or ``cuda:0 NVIDIA H200``."""
    lanes: int
    """How many it would take; 0: not even one fits."""
    reason: str
    """Memory needed against memory found."""

    @property
    def eligible(self) -> bool:
        """Whether a worker fits."""
        return self.lanes > 0


def find_pools(plan: MergePlan) -> list[EligiblePool]:
    """The machine's CPU and each of its GPUs."""
    host = free_host_memory()
    return [cpu_pool(plan, host), *(gpu_pool(plan, host, gpu) for gpu in list_gpus())]


def cpu_pool(plan: MergePlan, host: int) -> EligiblePool:
    """The CPU of a machine with so much memory free."""
    return _pool(plan, "cpu", "cpu", Memory(host=host, device=None))


def gpu_pool(
    plan: MergePlan, host: int, gpu: Gpu, neighbours: tuple[GpuProcess, ...] = ()
) -> EligiblePool:
    """One GPU of it, and who takes the rest."""
    found = Memory(host=host, device=gpu.free, neighbours=neighbours)
    return _pool(plan, f"cuda:{gpu.index} {gpu.name}", "cuda", found)


def unmeasured_gpu_pool(plan: MergePlan, host: int) -> EligiblePool:
    """A GPU of which nothing tells how full it is: the machine's memory alone decides."""
    return _pool(plan, "cuda", "cuda", Memory(host=host, device=None))


def _pool(plan: MergePlan, name: str, device: str, found: Memory) -> EligiblePool:
    try:
        choice = choose_lanes(plan, device, found)
    except DeviceMemoryError as error:
        return EligiblePool(name=name, lanes=0, reason=error.what)
    return EligiblePool(name=name, lanes=choice.lanes, reason=choice.reason)

"""Which devices of this machine could merge a plan, measured without torch or Ray."""

from __future__ import annotations

from dataclasses import dataclass

from merge_core.errors import DeviceMemoryError
from merge_core.memory import Memory, choose_lanes, free_host_memory
from merge_core.nvidia import list_gpus
from merge_core.plan import MergePlan


@dataclass(frozen=True, slots=True, kw_only=True)
class EligiblePool:
    """One device, and whether a worker fits on it."""

    name: str
    """``cpu``, or ``cuda:0 NVIDIA H200``."""
    eligible: bool
    reason: str
    """Memory needed against memory found."""


def find_pools(plan: MergePlan) -> list[EligiblePool]:
    """The machine's CPU and each of its GPUs."""
    host = free_host_memory()
    pools = [_pool(plan, "cpu", "cpu", Memory(host=host, device=None))]
    for gpu in list_gpus():
        found = Memory(host=host, device=gpu.free)
        pools.append(_pool(plan, f"cuda:{gpu.index} {gpu.name}", "cuda", found))
    return pools


def _pool(plan: MergePlan, name: str, device: str, found: Memory) -> EligiblePool:
    try:
        choice = choose_lanes(plan, device, found)
    except DeviceMemoryError as error:
        return EligiblePool(name=name, eligible=False, reason=error.what)
    return EligiblePool(name=name, eligible=True, reason=choice.reason)

"""Which devices of this machine could merge a plan, measured without torch or Ray."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass

from merge_core.errors import DeviceMemoryError
from merge_core.memory import Memory, choose_lanes, free_host_memory
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
    for index, name, free in _gpus():
        found = Memory(host=host, device=free)
        pools.append(_pool(plan, f"cuda:{index} {name}", "cuda", found))
    return pools


def _pool(plan: MergePlan, name: str, device: str, found: Memory) -> EligiblePool:
    try:
        choice = choose_lanes(plan, device, found)
    except DeviceMemoryError as error:
        return EligiblePool(name=name, eligible=False, reason=error.what)
    return EligiblePool(name=name, eligible=True, reason=choice.reason)


def _gpus() -> list[tuple[str, str, int]]:
    """Index, name and free bytes of each NVIDIA GPU, asked of the driver's own tool."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    query = [tool, "--query-gpu=index,name,memory.free", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []  # a broken driver: workers say so themselves when they ask torch
    rows = (line.split(", ") for line in answer.stdout.splitlines())
    return [(index, name, int(free) << 20) for index, name, free in rows if free.strip().isdigit()]

"""What NVIDIA's driver says about the GPUs of this machine, asked through its own tool.

``nvidia-smi`` comes with every driver and asks NVML; neither torch nor CUDA is started for it.
Nothing depends on the answers but what is said: without a tool, or with a broken driver, they are
empty.
"""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass

ANSWER_SECONDS = 20.0
"""A driver that wakes its GPUs up takes some seconds; one that hangs must not hang a merge."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One GPU."""

    index: str
    uuid: str
    name: str
    free: int
    """VRAM, in bytes."""

    def is_visible(self, visible: str | None) -> bool:
        """Whether CUDA_VISIBLE_DEVICES lets a process see it; None: it is not set."""
        named = [name.strip() for name in (visible or "").split(",")]
        return visible is None or any(
            name == self.index or (name.startswith("GPU-") and self.uuid.startswith(name))
            for name in named
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuProcess:
    """A process that holds VRAM."""

    pid: int
    name: str
    used: int | None
    """VRAM, in bytes; None where the driver does not tell (Windows, some containers)."""

    def __str__(self) -> str:
        amount = "VRAM" if self.used is None else f"{self.used / 1e6:,.0f} MB"
        return f"{amount} by {self.name} (process {self.pid})"


def list_gpus() -> list[Gpu]:
    """Every GPU of the machine, whatever CUDA_VISIBLE_DEVICES says."""
    rows = _ask("--query-gpu=index,uuid,memory.free,name", columns=4)
    return [
        Gpu(index=index, uuid=uuid, name=name, free=int(free) << 20)
        for index, uuid, free, name in rows
        if free.isdigit()
    ]


def gpu_processes() -> dict[str, list[GpuProcess]]:
    """The processes that compute on GPUs, as far as this one's container can see them.

    Returns:
        Those of each GPU that has any, by its UUID, such as
        ``GPU-8932f937-d72c-4106-c12f-20bd9faed9f6``.
    """
    found: dict[str, list[GpuProcess]] = {}
    query = "--query-compute-apps=gpu_uuid,pid,used_memory,process_name"
    for uuid, pid, used, name in _ask(query, columns=4):
        if pid.isdigit():
            vram = int(used) << 20 if used.isdigit() else None
            found.setdefault(uuid, []).append(GpuProcess(pid=int(pid), name=name, used=vram))
    return found


def _ask(*query: str, columns: int) -> list[list[str]]:
    """Rows of so many columns, of which the last may hold commas."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    command = [tool, *query, "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(
            command, capture_output=True, text=True, timeout=ANSWER_SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return []
    rows = (line.split(", ", columns - 1) for line in answer.stdout.splitlines())
    return [row for row in rows if len(row) == columns]

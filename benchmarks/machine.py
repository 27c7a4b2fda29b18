"""The machine that a measurement was made on, in words that stand beside its numbers."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

import psutil

CLONING = ("btrfs", "xfs", "bcachefs", "zfs")
"""File systems on which ``cp`` may share blocks instead of copying bytes."""


def describe(directory: Path) -> dict[str, str]:
    """Processor, memory, versions, and the disk that ``directory`` lies on."""
    cores, memory = len(os.sched_getaffinity(0)), psutil.virtual_memory().total
    return {
        "cpu": f"{_cpu()}, {cores} cores",
        "gpu": _gpu() or "none",
        "memory": f"{memory / 1e9:.1f} GB",
        "disk": _disk(directory),
        "kernel": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": importlib.metadata.version("torch"),
        "code": _commit(),
    }


def hardware_name(machine: dict[str, str]) -> str:
    """The processor and the GPU as part of a file name."""
    parts = [machine["cpu"]] + [machine["gpu"]] * (machine["gpu"] != "none")
    text = re.sub(r"\((r|tm)\)|processor|\bcpu\b|@ [\d.]+ghz", " ", " ".join(parts).lower())
    return re.sub(r"[^a-z0-9]+", "-", text).strip("-")


def may_clone(machine: dict[str, str]) -> bool:
    """Whether ``cp`` may copy no bytes on this disk, so that no ratio to it means anything."""
    return machine["disk"].startswith(CLONING)


def _cpu() -> str:
    with contextlib.suppress(OSError):
        text = Path("/proc/cpuinfo").read_text()
        found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
        if found:
            return found[1]
    return platform.machine()  # ARM kernels name no model


def _gpu() -> str:
    if shutil.which("nvidia-smi") is None:
        return ""
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    names = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split("\n")
    names = [name for name in names if name]
    return f"{len(names)} x {names[0]}" if names else ""


def _disk(directory: Path) -> str:
    """File system, device and, where the kernel knows it, the disk's model."""
    path = directory.resolve()
    mounts = [p for p in psutil.disk_partitions(all=True) if path.is_relative_to(p.mountpoint)]
    if not mounts:
        return "unknown"
    mount = max(mounts, key=lambda p: len(p.mountpoint))
    words = f"{mount.fstype} on {mount.device}"
    block = (Path("/sys/class/block") / Path(mount.device).resolve().name).resolve()
    for disk in (block, block.parent):  # a partition lies below its disk
        with contextlib.suppress(OSError):
            return f"{words} ({(disk / 'device/model').read_text().strip()})"
    return words


def _commit() -> str:
    """The commit that was measured; ``-dirty`` if files were changed since."""
    root = Path(__file__).parents[1]
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*"]
    with contextlib.suppress(OSError):
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return ""

"""An estimate, as a person reads it and as programs do."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from cluster.estimate import Estimate, Machines
from merge_core.errors import counted

_KINDS = {"cpu": "CPU", "cuda": "GPU"}


def estimate_lines(estimates: Mapping[int, Estimate], machines: Machines, level: str) -> list[str]:
    """How long the merge takes, a line for each number of nodes, and what that assumes."""
    rows = [
        (
            counted(count, "node") + f", {one.nodes} of use" * (one.nodes < count),
            duration(one.seconds),
            f"{one.node_hours:.2f} node-hours",
            f"slowest: {one.bottleneck}",
        )
        for count, one in estimates.items()
    ]
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    cells = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
    shared = "" if machines.storage == math.inf else f", {_gb_a_second(machines.storage)} in all"
    workers = counted(machines.workers, f"{_KINDS[machines.device]} worker")
    network = f"{_gb_a_second(machines.network)} each way to the storage{shared}"
    return [
        *(f"estimate {line}" for line in cells),
        f"assuming {workers} a node, {network}; nodes that are up; verified: {level}",
    ]


def estimate_documents(
    estimates: Mapping[int, Estimate], machines: Machines, level: str
) -> list[dict[str, Any]]:
    """The same for programs."""
    return [
        {
            "nodes": count,
            "nodes_of_use": one.nodes,
            "seconds": one.seconds,
            "node_hours": one.node_hours,
            "slowest": one.bottleneck,
            "workers_per_node": machines.workers,
            "device": machines.device,
            "node_bytes_per_second": machines.network,
            "storage_bytes_per_second": None if machines.storage == math.inf else machines.storage,
            "verify": level,
        }
        for count, one in estimates.items()
    ]


def _gb_a_second(rate: float) -> str:
    return f"{rate / 1e9:.3g} GB/s"


def duration(seconds: float) -> str:
    """``45 seconds`` or ``12 minutes``: no estimate is worth more digits."""
    if seconds < 120:
        return counted(round(seconds), "second")
    return counted(round(seconds / 60), "minute")

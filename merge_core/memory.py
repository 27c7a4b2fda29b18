"""How many lanes a worker takes, from the memory that it finds free.

This is the only thing that a worker decides by itself, and it changes no byte of the result.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from merge_core.blocks import largest_block
from merge_core.cgroup import free_in_cgroups
from merge_core.digest import CELL_BYTES
from merge_core.errors import DeviceMemoryError, counted
from merge_core.layout import DTYPE_BYTES
from merge_core.nvidia import GpuProcess
from merge_core.plan import MergePlan, TensorTask
from merge_core.read_ahead import MOST_BYTES
from merge_core.storage import SLACK
from merge_core.updates import LowRankUpdate, StackedUpdate, Update
from merge_core.updates.factor import KEPT_TENSORS

MAX_LANES = 8
"""While some lanes multiply, enough others must wait on the disk to keep it busy: on two cores a
4B took 8.6 s with eight lanes, 9.5 s with four, and 8.4 s with twelve (medians of four)."""

READ_SIZES = (CELL_BYTES, CELL_BYTES // 2, CELL_BYTES // 4, CELL_BYTES // 8)
"""Sizes of a read: a whole cell, or an even part of it. 1 MiB still reads at disk speed when
four lanes do it; below that the time per request shows."""

SHARE = 0.8
"""Of the free memory, what a worker plans to use: the rest is for who else is there."""


NORM_BYTES = 4 * 4 + 2 * 8
"""For an element of a block whose columns' squares are summed up: the base as it is stored and in
float32, the delta, its product, and the sum and its square in float64."""


DECODING_BYTES = 5 * 4
"""For an element while it is decoded: its code, its value, its zero point and its scale, each in
four bytes, and what comes out. No format needs all five."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes free on a worker."""

    host: int
    device: int | None
    """Free VRAM; None on a CPU worker."""
    neighbours: tuple[GpuProcess, ...] = ()
    """Other processes that hold VRAM of the same GPU, as far as they can be seen."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LaneNeed:
    """Bytes that a worker needs to run lanes of one read size."""

    inbox: int
    outbox: int
    block: int
    """Elements of the largest block of rows."""
    scratch: int
    """How many such blocks in float32 a lane needs on the device: none where nothing is merged,
    two, or four for DoRA."""
    factors: int
    """Of the tensor with the largest factors, in float32. Each lane holds on to those of its last
    block, and one more tensor's are being loaded."""
    kept: int = 0
    """Of the tensors of adapters that many updates take parts of, on the host."""
    decoded: int = 0
    """Host memory that each lane may hold of a packed tensor, and needs to decode a piece of it."""
    alone: int = 0
    """For the largest tensor that is worked out as a whole, of which there is one at a time."""

    ahead: int = 0
    """Host memory for what is fetched of a base in a store before a lane asks for it."""

    def on_host(self, lanes: int, device: str) -> int:
        """Host memory for that many lanes, without the runtime."""
        each = self.inbox + self.outbox + (4 * self.scratch * self.block if device == "cpu" else 0)
        shared = self.kept + self.alone + self.ahead
        return lanes * (each + self.decoded) + (lanes + 1) * self.factors + shared

    def on_device(self, lanes: int) -> int:
        """VRAM for that many lanes."""
        each = self.inbox + self.outbox + 4 * self.scratch * self.block
        return lanes * each + (lanes + 1) * self.factors + self.alone


@dataclass(frozen=True, slots=True, kw_only=True)
class LaneChoice:
    """What a worker chose, and why."""

    lanes: int
    read_bytes: int
    reason: str


def lane_need(plan: MergePlan, device: str, read_bytes: int) -> LaneNeed:
    """What lanes of this read size need for the plan's largest tensors.

    Args:
        device: ``cpu`` or ``cuda``; the blocks of the product differ.
    """
    widening, rest, block, scratch, factors, decoded, alone = 1.0, 0, 0, 0, 0, 0, 0
    for task in plan.tasks:
        ratio = task.source.dtype_bytes / DTYPE_BYTES[task.target.dtype]
        widening = max(widening, ratio)
        decoded = max(decoded, _decoded(task, read_bytes))
        if task.updates:
            rows, width = task.matrix
            block = max(block, largest_block(rows, width, device))
            scratch = max(scratch, 4 if task.whole_rows else 2)
            loaded = sum(4 * update.elements for update in task.updates)
            alone = max(alone, *(alone_bytes(update, plan) for update in task.updates))
            if task.column_norms:
                loaded += NORM_BYTES * largest_block(rows, width, device)
            factors = max(factors, loaded)
        if task.whole_rows:  # a piece may begin and end inside of one
            rest = max(rest, 2 * width * task.source.dtype_bytes)
    return LaneNeed(
        inbox=int(read_bytes * widening) + rest + SLACK,
        outbox=read_bytes + SLACK,
        block=block,
        scratch=scratch,
        factors=factors,
        kept=_kept(plan),
        decoded=decoded,
        alone=alone,
        ahead=0 if plan.base.is_local else MOST_BYTES,
    )


def choose_lanes(plan: MergePlan, device: str, found: Memory, most: int = MAX_LANES) -> LaneChoice:
    """The most lanes, of the largest reads, that the free memory holds.

    Smaller reads come before fewer lanes: a lane less costs overlap, a smaller read nearly nothing.

    Raises:
        DeviceMemoryError: not even one lane of the smallest reads fits.
    """
    sizes = READ_SIZES if plan.base.is_local else READ_SIZES[-1:]  # out of blocks that are there
    for lanes in range(most, 0, -1):
        for read_bytes in sizes:
            need = lane_need(plan, device, read_bytes)
            host, vram = need.on_host(lanes, device), need.on_device(lanes)
            if host <= found.host * SHARE and (
                found.device is None or vram <= found.device * SHARE
            ):
                return LaneChoice(
                    lanes=lanes,
                    read_bytes=read_bytes,
                    reason=_reason(lanes, read_bytes, host, vram, found),
                )
    least = lane_need(plan, device, READ_SIZES[-1])
    raise DeviceMemoryError(
        f"one lane needs {_mb(least.on_host(1, device))} of memory"
        + (f" and {_mb(least.on_device(1))} of VRAM" if found.device is not None else "")
        + f", found free: {_found(found)}",
        where=device,
        remedy="Stop what else runs there, or use another machine.",
    )


def free_host_memory() -> int:
    """Bytes that this process may still take: what the machine has free, within its cgroups."""
    available, allowed = _meminfo_available(), free_in_cgroups()
    return available if allowed is None else min(available, allowed)


def _meminfo_available() -> int:
    import psutil

    return int(psutil.virtual_memory().available)


def _kept(plan: MergePlan) -> int:
    """Bytes of the tensors that ``inputs`` keeps, since many updates take parts of them."""
    stacks = (LowRankUpdate, StackedUpdate)
    updates = (u for task in plan.tasks for u in task.updates if isinstance(u, stacks))
    parts = (factor for update in updates for factor in update.factors if not factor.is_stored)
    largest = max((math.prod(part.tensor.shape) for part in parts), default=0)
    return len(plan.adapters) * KEPT_TENSORS * 4 * largest


def _decoded(task: TensorTask, read_bytes: int) -> int:
    """Each lane may be at a tensor of its own, small ones above all."""
    source, width = task.source, task.matrix[1]
    if source.decoding is None:
        return 0
    piece = read_bytes // DTYPE_BYTES[task.target.dtype] + 2 * width  # it may end inside of a row
    return source.bytes_read + SLACK + DECODING_BYTES * min(piece, math.prod(source.tensor.shape))


def alone_bytes(update: Update, plan: MergePlan) -> int:
    """Bytes that are needed to work out an update, besides what it then holds; 0 for most."""
    if update.kind == "combined":
        return 4 * update.alone_elements
    tuning = plan.adapters[update.adapter].tuning
    if update.kind != "through_peft" or tuning is None:
        return 0
    tensors = sum(math.prod(tensor.shape) for tensor in (*update.tensors, *tuning.shared))
    return 4 * (tuning.elements(update.layer) + 2 * tensors)


def _reason(lanes: int, read_bytes: int, host: int, vram: int, found: Memory) -> str:
    parts = [f"{_mb(host)} of memory"] + [f"{_mb(vram)} of VRAM"] * (found.device is not None)
    return (
        f"{counted(lanes, 'lane')} of {read_bytes >> 20} MiB reads need {' and '.join(parts)};"
        f" found free: {_found(found)}"
    )


def _found(found: Memory) -> str:
    vram = f" and {_mb(found.device)} of VRAM" if found.device is not None else ""
    others = f"; taken: {', '.join(map(str, found.neighbours))}" if found.neighbours else ""
    return f"{_mb(found.host)} of memory{vram}{others}"


def _mb(nbytes: int) -> str:
    return f"{nbytes / 1e6:,.0f} MB"

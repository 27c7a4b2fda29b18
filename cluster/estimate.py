"""How long a merge takes on a described cluster, what sets the pace, and what it costs.

Pure arithmetic on a plan; ``docs/scale.md`` derives it. Nodes are equal and up when it starts.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from merge_core.digest import CELL_BYTES
from merge_core.layout import TensorSpec
from merge_core.plan import MergePlan, Shard

START_SECONDS = 5.0
"""From the command to the first shard: Python, Ray's connection, a worker that imports torch. Seen
with one worker on two busy cores; many, each on a node of its own, are taken to be as quick."""

COMMIT_SECONDS = 0.5
"""Index, ledger, side files, config.json."""

ITEM_SECONDS = 0.03
"""Of the merge or the check of a shard, beside what its bytes take: opening and allocating files,
fsync, the receipt, the next assignment."""

ACCEPT_SECONDS = 0.01
"""Of the collector, for a shard: its receipt is made durable and its file renamed, one shard after
another. Like the three above it was seen in benchmarks/results/scale_*, on two busy cores and a
local disk; a network file system may take longer."""

CORES = 4
"""Of a worker: what ``workers.CPUS_A_WORKER`` asks for at most, and what hashes beside a GPU."""

DIGEST_SPEED, NUMERIC_SPEED = 2.8e9, 0.3e9
"""Bytes of the result that one core reads back and checks in a second."""

DECODING_SPEED = {
    "gptq": 75e6, "awq": 100e6, "awq_gemv": 250e6, "awq_gemv_fast": 150e6, "four_bit": 300e6,
    "int8": 500e6, "fp8": 100e6, "nf4": 22e6,
}  # fmt: skip
"""Values of packed weights that one core decodes in a second, or rounds to NF4, by the kind of the
decoding: seen on one busy core. Level numeric, which has code of its own, takes about as long."""

SEAL_SPEED = 1.5e9
"""Bytes of adapters that the driver, on one core, hashes and searches for NaN in a second."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Arithmetic:
    """What a worker gets done on data that is there."""

    passes: float
    """Bytes of the result a second, the product apart."""
    products: float
    """Multiplications and additions a second."""


ARITHMETIC = {
    "cpu": Arithmetic(passes=CORES * 0.55e9, products=CORES * 50e9),
    "cuda": Arithmetic(passes=min(300e9 / 26, CORES * DIGEST_SPEED), products=15e12),
}
"""CPU: measured on one core, benchmarks/results/core-speed_*. CUDA: not measured but reckoned for
an L4, the slowest GPU in the cluster files: its memory moves 300 GB/s, of which a byte of the
result takes 26 (``kernel`` and ``lanes`` pass over 52 bytes an element of two), and half of its 30
TFLOP/s; the cores beside it take the digests."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machines:
    """A cluster, as far as it matters here."""

    nodes: int
    workers: int = 1
    """A node."""
    network: float
    """Bytes a second between a node and the storage, each way: a network card does both at once."""
    storage: float = math.inf
    """Bytes a second that all nodes together read and write."""
    device: str = "cpu"


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What a merge takes."""

    nodes: int
    """Those that have anything to do; an autoscaler starts no others."""
    seconds: float
    bottleneck: str
    """What would cost most time if it were half as fast."""

    @property
    def node_hours(self) -> float:
        """All of them until the end, though some could leave before."""
        return self.nodes * self.seconds / 3600


def estimate(plan: MergePlan, machines: Machines, level: str) -> Estimate:
    """What ``plan`` takes on ``machines``, verified at ``level``."""
    workers = min(machines.nodes * machines.workers, len(plan.stage))
    pace = _Pace(
        network=machines.network / min(machines.workers, workers), storage=machines.storage
    )
    run = _Run(
        workers=workers,
        merges=tuple(_merges(plan, ARITHMETIC[machines.device])),
        checks=tuple(_checks(plan, level)),
        waits=level == "numeric",
        adapters=sum(adapter.file.size for adapter in plan.adapters),
    )
    seconds = run.seconds(pace)
    cost = {name: run.seconds(slower) - seconds for name, slower in _slowed(pace)}
    return Estimate(
        nodes=math.ceil(workers / machines.workers),
        seconds=seconds,
        bottleneck=max(cost, key=lambda name: cost[name]),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pace:
    """Everything that could be slower."""

    network: float
    """Bytes a second of one worker, each way."""
    storage: float
    arithmetic: float = 1.0
    """The speeds above times this."""
    hands: float = 1.0
    """The fixed times above over this."""


def _slowed(pace: _Pace) -> Iterator[tuple[str, _Pace]]:
    yield "network of the nodes", replace(pace, network=pace.network / 2)
    yield "storage", replace(pace, storage=pace.storage / 2)
    yield "arithmetic", replace(pace, arithmetic=pace.arithmetic / 2)
    yield "start, handing over and commit", replace(pace, hands=pace.hands / 2)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Item:
    """The merge or the check of a shard."""

    read: int
    written: int = 0
    last: int = 0
    """Bytes that are written when nothing is left to be read: those of a lane's last cell."""
    busy: float
    """Seconds of arithmetic."""

    def seconds(self, pace: _Pace) -> float:
        """Lanes read, compute and write at the same time: the slowest of the three counts."""
        moving = max(self.read, self.written) / pace.network
        alone = ITEM_SECONDS / pace.hands + self.last / pace.network
        return alone + max(moving, self.busy / pace.arithmetic)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    """All there is to do."""

    workers: int
    merges: tuple[_Item, ...]
    checks: tuple[_Item, ...]
    waits: bool
    """No check begins before the last merge has ended."""
    adapters: int
    """Bytes, which the driver reads and checks first."""

    def seconds(self, pace: _Pace) -> float:
        """The fixed times, and in between the slowest of all workers, the largest shard from its
        merge to its check, the storage, and the collector.
        """
        busy = _hand_out([0.0] * self.workers, self.merges, pace)
        if self.waits:
            busy = [max(busy)] * self.workers
        busy = _hand_out(busy, self.checks, pace)
        moved = sum(item.read + item.written for item in self.merges + self.checks)
        accepted = len(self.merges) * ACCEPT_SECONDS / pace.hands
        ends = (START_SECONDS + COMMIT_SECONDS) / pace.hands
        ends += self.adapters / pace.network + self.adapters / SEAL_SPEED / pace.arithmetic
        largest = sum(item.seconds(pace) for item in (*self.merges[:1], *self.checks[:1]))
        return ends + max(*busy, largest, moved / pace.storage, accepted)


def _hand_out(busy: list[float], items: Iterable[_Item], pace: _Pace) -> list[float]:
    """When each worker is free, if the first that is takes the next item."""
    heapq.heapify(busy)
    for item in items:
        heapq.heappush(busy, heapq.heappop(busy) + item.seconds(pace))
    return busy


def _merges(plan: MergePlan, arithmetic: Arithmetic) -> Iterator[_Item]:
    for shard in _in_order(plan):
        read, products = 0, 0
        factors: set[tuple[int, TensorSpec]] = set()  # some are of many tensors, and read once
        for task in shard.tasks:
            passes = 1 + task.column_norms  # which are known only when all of it was read
            read += passes * task.source.bytes_read
            for part in task.parts:
                factors |= {(part.adapter, tensor) for tensor in part.tensors}
            for update in task.updates:
                products += passes * 2 * update.rank * math.prod(task.target.shape)
        read += sum(tensor.nbytes for _, tensor in factors)
        busy = shard.size / arithmetic.passes + products / arithmetic.products + _decoding(shard)
        last = min(CELL_BYTES, max(task.target.nbytes for task in shard.tasks))
        yield _Item(read=read, written=shard.size, last=last, busy=busy)


def _checks(plan: MergePlan, level: str) -> Iterator[_Item]:
    if len(plan.stage) < len(plan.shards):
        return  # nothing is verified before the last stage
    for shard in _in_order(plan):
        read, busy = 0, 0.0
        if level != "structure":
            read, busy = shard.size, shard.size / (CORES * DIGEST_SPEED)
        if level == "numeric":  # on top of the digests, once more and beside the base
            read += shard.size + sum(task.source.bytes_read for task in shard.tasks)
            busy += shard.size / (CORES * NUMERIC_SPEED) + _decoding(shard)
        yield _Item(read=read, busy=busy)


def _decoding(shard: Shard) -> float:
    """Seconds that a worker decodes for it; on the CPU, wherever the products are."""
    return sum(
        math.prod(task.target.shape) / (CORES * DECODING_SPEED[task.source.decoding.kind])
        for task in shard.tasks
        if task.source.decoding is not None
    )


def _in_order(plan: MergePlan) -> list[Shard]:
    """As the schedule hands them out."""
    now = [shard for shard in plan.shards if shard.index in plan.stage]
    return sorted(now, key=lambda shard: -shard.size)

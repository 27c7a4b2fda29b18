"""What a run counts for Prometheus, through Ray's metrics.

The driver counts, from what its workers' receipts say, and not the workers: only the driver knows
which part was accepted, and what a worker counted since Ray's last report, up to ten seconds ago,
is gone when its process is killed. Nobody waits for anything here: Ray sums up in this process and
reports from a thread of its own; where nobody takes the reports, they are dropped.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Mapping

import ray
from ray.util.metrics import Counter, Gauge

from actors.events import ItemDone, ItemFailed, WorkerLost
from merge_core.ledger import Receipt
from merge_core.verify import FileResult


class Metrics:
    """The metrics of one run. Their names in Prometheus have ``ray_`` before them.

    Seconds are counters and no histograms: Ray rebuilds histograms from the middles of their
    buckets, so that their sums are wrong.

    Only the first connection of a process to Ray counts: Ray keeps what it reports through, so that
    it reports everything of the third twice, of the fourth three times, and so on.
    """

    def __init__(self) -> None:
        self._counts = _connection() == _first_connection()
        self._shards = Counter(
            "raymeld_shards_total",
            "Shards by result: merged (accepted, too), proven (left by an earlier run), verified,"
            " refuted (by a proof or a verification), failed (an attempt), lost (an attempt, with"
            " its worker).",
            ("result", "device"),
        )
        self._bytes = Counter(
            "raymeld_bytes_total",
            "Bytes of finished shards: read (of the base), written (whole files), read_back (to"
            " prove or verify them, and of the base what they are compared with).",
            ("direction", "device"),
        )
        self._seconds = Counter(
            "raymeld_phase_seconds_total",
            "Seconds of finished shards: read, merge and write (summed over lanes, which overlap),"
            " verify (and prove).",
            ("phase", "device"),
        )
        self._in_flight = Gauge("raymeld_in_flight", "Shards that workers are at.", ("device",))
        self._workers = Gauge("raymeld_workers", "Workers that are up.", ("device",))
        self._peak = Gauge(
            "raymeld_peak_bytes",
            "The most memory that a worker took for one shard: host, or vram.",
            ("memory", "device"),
        )
        self._most: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))

    def count(self, event: ItemDone | ItemFailed | WorkerLost, device: str, well: str = "") -> None:
        """Count how an attempt of a shard ended.

        Args:
            event: settled; about an attempt that still counts.
            device: the kind of its worker.
            well: the result, if it ended well.
        """
        if not self._counts:
            return
        match event:
            case ItemDone(result=Receipt() as receipt):
                result = well
                self._count_merged(receipt, device)
            case ItemDone(result=FileResult() as check):
                result = "refuted" if check.findings else well
                _add(self._bytes, check.bytes_read, direction="read_back", device=device)
                _add(self._seconds, check.seconds, phase="verify", device=device)
            case WorkerLost():
                result = "lost"
            case _:
                result = "failed"
        _add(self._shards, 1, result=result, device=device)

    def show(self, in_flight: Mapping[str, int], workers: Mapping[str, int]) -> None:
        """Say what goes on now, by device; what is not named is not changed."""
        if not self._counts:
            return
        for device, number in in_flight.items():
            self._in_flight.set(number, {"device": device})
        for device, number in workers.items():
            self._workers.set(number, {"device": device})

    def _count_merged(self, receipt: Receipt, device: str) -> None:
        rows = receipt.tensors
        _add(self._bytes, sum(r.bytes_read for r in rows), direction="read", device=device)
        _add(self._bytes, receipt.size, direction="written", device=device)
        _add(self._seconds, sum(r.read_seconds for r in rows), phase="read", device=device)
        _add(self._seconds, sum(r.merge_seconds for r in rows), phase="merge", device=device)
        _add(self._seconds, sum(r.write_seconds for r in rows), phase="write", device=device)
        most = self._most[device]
        for memory, peak in (("host", receipt.peak_memory), ("vram", receipt.peak_vram)):
            if peak is not None:
                most[memory] = max(most[memory], peak)
                self._peak.set(most[memory], {"memory": memory, "device": device})


def driver_line() -> str:
    """Tells what Prometheus has the metrics of this driver under, as their ``WorkerId``."""
    return f"its metrics are those of driver {ray.get_runtime_context().get_worker_id()}"


@functools.cache
def _first_connection() -> tuple[str, str]:
    return _connection()


def _connection() -> tuple[str, str]:
    """Which cluster this process is connected to, and as which of its jobs."""
    here = ray.get_runtime_context()
    return here.gcs_address, here.get_job_id()


def _add(counter: Counter, amount: float, **tags: str) -> None:
    """Ray raises on an increment of nothing, such as a copied shard's seconds of merging."""
    if amount > 0:
        counter.inc(amount, tags)

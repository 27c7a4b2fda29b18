"""A worker: merges one shard at a time on one device, in the memory that it finds."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from merge_core.errors import DeviceMemoryError, counted, refuse
from merge_core.inputs import Inputs
from merge_core.kernel import LoadedUpdates
from merge_core.lanes import Lane, out_of_memory_reported
from merge_core.ledger import Receipt, TensorRecord
from merge_core.memory import LaneChoice, Memory, choose_lanes, free_host_memory, lane_need
from merge_core.nvidia import gpu_processes
from merge_core.peaks import Peaks, resident
from merge_core.plan import MergePlan, Shard, TensorTask
from merge_core.server_copy import PartStarter
from merge_core.stores.location import Location
from merge_core.stores.scratch import ScratchPart
from merge_core.stores.store import PartWriter
from merge_core.stream import LoadedTask, stream_shard


def pick_device(wanted: str) -> str:
    """``cuda`` or ``cpu`` for ``auto``; what was asked for otherwise.

    Raises:
        InputError: ``cuda`` was asked for where there is none.
    """
    found = torch.cuda.is_available()
    if wanted == "cuda" and not found:
        raise refuse("torch finds no CUDA device", "--device cuda", "Use --device cpu or auto")
    return "cuda" if wanted != "cpu" and found else "cpu"


def measure_memory(device: str) -> Memory:
    """What is free now on this machine and its first visible GPU, and who takes the rest."""
    if device != "cuda":
        return Memory(host=free_host_memory(), device=None)
    vram, _ = torch.cuda.mem_get_info()
    uuid = f"GPU-{torch.cuda.get_device_properties(0).uuid}"
    seen = gpu_processes().get(uuid, [])
    others = tuple(process for process in seen if process.pid != os.getpid())
    return Memory(host=free_host_memory(), device=vram, neighbours=others)


class ShardWorker:
    """Merges shards of one plan into parts that somebody else publishes.

    Args:
        plan: sealed.
        out: the destination.
        device: ``cpu`` or ``cuda`` (the first visible GPU).
        name: who did it, for the ledger.
        choice: lanes and size of reads; None measures the free memory and chooses.
        say: told what it waits for, in words that follow its name.

    Raises:
        DeviceMemoryError: not even one lane fits.
        StorageError: an adapter or a base file changed since the plan was made.
    """

    def __init__(
        self,
        plan: MergePlan,
        out: Location,
        device: str,
        name: str = "inline",
        choice: LaneChoice | None = None,
        say: Callable[[str], None] | None = None,
    ) -> None:
        self._plan, self._name = plan, name
        self._parts = PartStarter(plan, out, say)
        self._fingerprint = plan.fingerprint
        self._device = torch.device(device)
        self.found = measure_memory(device)
        self._memory_limit = resident() + self.found.host
        self.choice = choice or choose_lanes(plan, device, self.found)
        self._most_lanes = self.choice.lanes
        self._lanes: list[Lane] = []
        self._inputs = Inputs(plan)

    def merge(
        self,
        index: int,
        attempt: int,
        watch: Callable[[int], None],
        shrink: int = 0,
        then: int | None = None,
    ) -> Receipt:
        """Merge shard ``index`` into a part of its own; leaves nothing behind if it fails.

        Args:
            attempt: 1 for the first.
            watch: called now and then with the bytes written; what it raises ends the attempt.
            shrink: how often this shard ran out of memory, here or elsewhere: each time it gets a
                third of the lanes.
            then: the shard that this worker is given next, if that is known.

        Raises:
            RaymeldError: see ``stream.stream_shard``.
        """
        shard = self._plan.shards[index]
        following = None if then is None else self._plan.shards[then]
        started, clock = time.time(), time.perf_counter()
        unique = f"{attempt}-{secrets.token_hex(8)}"
        part = self._parts.start(shard, unique)
        Peaks.start(self._device.type)
        if shrink:
            self._take_lanes(max(1, self._most_lanes // 3**shrink))  # 8, 2, 1 in three attempts
        try:
            with self._inputs.fetched_ahead(shard, following):
                records = self._stream(shard, part, watch)
            self._inputs.check(shard)
            finished = self._finish(part, shard, unique, records, watch)
        except BaseException:
            part.discard()
            raise
        peaks = Peaks.since_start(self._device.type)
        return Receipt(
            fingerprint=self._fingerprint,
            shard=index,
            attempt=attempt,
            part=finished,
            size=shard.size,
            worker=self._name,
            host=socket.gethostname(),
            device=self.describe_device(),
            started=started,
            seconds=time.perf_counter() - clock,
            lanes=self.choice.reason,
            peak_memory=peaks.memory,
            peak_vram=peaks.vram,
            memory_limit=self._memory_limit,
            vram_limit=self.found.device,
            note=self._parts.refusal,
            tensors=records,
        )

    def describe_device(self) -> str:
        """``cpu``, or the GPU's name."""
        return torch.cuda.get_device_name() if self._device.type == "cuda" else "cpu"

    def close(self) -> None:
        """Close the input files."""
        self._inputs.close()

    def _stream(
        self, shard: Shard, part: PartWriter, watch: Callable[[int], None]
    ) -> tuple[TensorRecord, ...]:
        try:
            with exact_float32(), out_of_memory_reported(self._device):
                return stream_shard(
                    shard,
                    part=part,
                    load=self._load,
                    lanes=self._allocated_lanes(),
                    read_bytes=self.choice.read_bytes,
                    watch=watch,
                )
        except DeviceMemoryError:
            self._take_lanes(max(1, self.choice.lanes // 3))
            raise

    def _finish(
        self,
        part: PartWriter,
        shard: Shard,
        unique: str,
        records: Sequence[TensorRecord],
        watch: Callable[[int], None],
    ) -> str:
        if not isinstance(part, ScratchPart):
            return part.finish()
        from merge_core.sending import send_part  # and huggingface_hub

        written = sum(record.nbytes for record in records)
        told = functools.partial(watch, written)
        return send_part(self._parts.out, shard.name, unique, part, records, told)

    def _allocated_lanes(self) -> Sequence[Lane]:
        need = lane_need(self._plan, self._device.type, self.choice.read_bytes)
        while len(self._lanes) < self.choice.lanes:
            self._lanes.append(Lane(need, self._device))
        return self._lanes

    def _take_lanes(self, fewer: int) -> None:
        """From now on, for every shard: the memory is not what it looked like."""
        if fewer >= self.choice.lanes:
            return
        self._lanes.clear()
        reason = (
            f"{counted(fewer, 'lane')} instead of {self._most_lanes} after running out of memory"
        )
        self.choice = dataclasses.replace(self.choice, lanes=fewer, reason=reason)
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _load(self, task: TensorTask) -> LoadedTask:
        inputs = self._inputs.of(task, self._device)
        loaded = LoadedTask(inputs.read, LoadedUpdates.of(task.updates, inputs))
        if self._device.type == "cuda":  # lanes have streams of their own, which wait for no other
            torch.cuda.current_stream(self._device).synchronize()
        return loaded


@contextlib.contextmanager
def exact_float32() -> Iterator[None]:
    """Products in real float32 (no TF32, no bfloat16 shortcuts), the caller's settings restored.

    Set where each backend looks: the older ``torch.set_float32_matmul_precision`` raises once a
    program has used these. The thread count is restored too: lanes set theirs to one, which torch
    also takes as the default of threads that start later.
    """
    mkldnn: Any = torch.backends.mkldnn
    backends: tuple[Any, ...] = (torch.backends.cuda.matmul, mkldnn.matmul)
    before, threads = [backend.fp32_precision for backend in backends], torch.get_num_threads()
    for backend in backends:
        backend.fp32_precision = "ieee"
    try:
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision
        torch.set_num_threads(threads)

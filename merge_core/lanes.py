"""A lane: the buffers of one thread, and the way of a piece of a tensor through them.

Read range, to the device, merge, back, and the result lies page aligned in the outbox, ready to
be written. Everything is allocated once: the first touch of fresh memory costs more than the
arithmetic. On CUDA the host buffers are pinned and each lane has a stream of its own, so that
copies and products of the lanes overlap.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from merge_core.errors import DeviceMemoryError
from merge_core.kernel import LoadedUpdates, MergeKernel
from merge_core.layout import ALIGNMENT
from merge_core.memory import LaneNeed
from merge_core.plan import TensorTask
from merge_core.updates.piece import Change, Piece

TORCH_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


_OUT_OF_MEMORY = ("DefaultCPUAllocator", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""What torch says where it has no exception type for it."""


class Lane:
    """Buffers for one thread on one device."""

    def __init__(self, need: LaneNeed, device: torch.device) -> None:
        with out_of_memory_reported(device):
            self.inbox = aligned(need.inbox, device)
            self._outbox = aligned(need.outbox, device)
            self._kernel = MergeKernel(need.block, need.scratch, device)
            self._on_gpu = device.type == "cuda"
            if self._on_gpu:
                self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
                self._device_in = torch.empty(need.inbox, dtype=torch.uint8, device=device)
                self._device_out = torch.empty(need.outbox, dtype=torch.uint8, device=device)
        self.inbox_view = self.inbox.numpy().data

    def transform(
        self, task: TensorTask, updates: LoadedUpdates, piece: Piece, data: memoryview
    ) -> tuple[memoryview, Change]:
        """The output bytes of ``piece``, and how much they changed.

        Args:
            task: what to do.
            updates: the task's updates, loaded.
            data: the base's bytes from ``piece.source_first`` on, as a view inside ``inbox``.

        Returns:
            A view that starts on a page, valid until the next call.
        """
        lead = _address(data) - self.inbox.data_ptr()
        if task.as_bytes:
            if lead % ALIGNMENT == 0:
                return data, Change()
            target = self._outbox[: len(data)]
            target.copy_(self.inbox[lead : lead + len(data)])
            return target.numpy().data, Change()
        nbytes = (piece.behind - piece.first) * TORCH_DTYPES[task.target.dtype].itemsize
        with self._streamed():
            source = self._upload(lead, len(data)).view(TORCH_DTYPES[task.source.tensor.dtype])
            target = self._result(nbytes).view(TORCH_DTYPES[task.target.dtype])
            if task.updates:
                change = self._kernel.merge(updates, piece, source, target)
            else:
                change = Change()
                self._kernel.convert(piece.first, piece.matrix[1], source, target)
            self._download(nbytes)
        return self._outbox[:nbytes].numpy().data, change

    @contextlib.contextmanager
    def _streamed(self) -> Iterator[None]:
        if not self._on_gpu:
            yield
            return
        with torch.cuda.stream(self._stream):
            yield
        self._stream.synchronize()

    def _upload(self, lead: int, nbytes: int) -> torch.Tensor:
        """The base bytes on the device, aligned for any element."""
        if not self._on_gpu and lead % 8 == 0:
            return self.inbox[lead : lead + nbytes]
        if not self._on_gpu:  # tensors at odd offsets exist: the format does not forbid them
            return self.inbox[lead : lead + nbytes].clone()
        into = self._device_in[:nbytes]
        return into.copy_(self.inbox[lead : lead + nbytes], non_blocking=True)

    def _result(self, nbytes: int) -> torch.Tensor:
        return (self._device_out if self._on_gpu else self._outbox)[:nbytes]

    def _download(self, nbytes: int) -> None:
        if self._on_gpu:
            self._outbox[:nbytes].copy_(self._device_out[:nbytes], non_blocking=True)


@contextlib.contextmanager
def out_of_memory_reported(device: torch.device) -> Iterator[None]:
    """Turn torch's several ways of saying "out of memory" into one error."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, DeviceMemoryError) or not is_out_of_memory(error):
            raise
        raise DeviceMemoryError(
            str(error).splitlines()[0] if str(error) else "out of memory",
            where=str(device),
            remedy="It is tried again with fewer lanes.",
        ) from error


def is_out_of_memory(error: Exception) -> bool:
    """Whether torch or Python ran out of memory; torch's CPU allocator has no type for it."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        any(sign in str(error) for sign in _OUT_OF_MEMORY)
    )


def aligned(nbytes: int, device: torch.device) -> torch.Tensor:
    """``nbytes`` of host memory that start on a page, pinned where a GPU copies from it."""
    raw = torch.empty(
        nbytes + ALIGNMENT, dtype=torch.uint8, device="cpu", pin_memory=device.type == "cuda"
    )
    skip = -raw.data_ptr() % ALIGNMENT
    return raw[skip : skip + nbytes]


def _address(data: memoryview) -> int:
    return int(torch.frombuffer(data, dtype=torch.uint8).data_ptr()) if len(data) else 0

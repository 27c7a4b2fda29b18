"""Rows of decoded tensors, as bytes: what a worker reads of them is made when it is asked for."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from merge_core.decoding.stored import Rows, Stored
from merge_core.lanes import aligned
from merge_core.storage import SLACK
from merge_core.stores.store import Reader

_DTYPES = {
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F8_E4M3": torch.float8_e4m3fn,
}
"""Of stored parts."""


def fetch_from(readers: Sequence[Reader], stored: Stored) -> torch.Tensor:
    """A whole stored tensor, past the page cache.

    Raises:
        StorageError: it cannot be read.
    """
    tensor, host = stored.tensor, torch.device("cpu")
    buffer = aligned(tensor.nbytes + SLACK, host).numpy().data
    view = readers[stored.file].read_into(buffer, tensor.offset, tensor.nbytes)
    dtype = _DTYPES[tensor.dtype]
    if tensor.nbytes == 0:
        return torch.empty(tensor.shape, dtype=dtype)
    raw = torch.frombuffer(view, dtype=torch.uint8)
    if raw.data_ptr() % dtype.itemsize:  # the format lets tensors begin anywhere
        raw = raw.clone()
    return raw.view(dtype).view(tensor.shape)


def read_rows(
    loaded: Rows, row_bytes: int, first: int, behind: int, into: memoryview
) -> memoryview:
    """Bytes ``first`` ... ``behind`` of the decoded tensor, at the start of ``into``."""
    top, bottom = first // row_bytes, -(-behind // row_bytes)
    rows = loaded.rows(top, bottom).contiguous().view(torch.uint8).view(-1)
    view = into[: behind - first]
    start = top * row_bytes
    torch.frombuffer(view, dtype=torch.uint8).copy_(rows[first - start : behind - start])
    return view

"""A decoding without a checkpoint: from tensors at hand to rows of the weight."""

from __future__ import annotations

from collections.abc import Callable

import torch
from oracles import Tensors

from merge_core.decoding import Decoding
from merge_core.decoding.module import PackedModule
from merge_core.decoding.stored import Stored
from merge_core.layout import TensorSpec

DTYPE_NAMES = {
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.float8_e4m3fn: "F8_E4M3",
}


def decoded_rows(
    decoding_of: Callable[[PackedModule], Decoding], parts: Tensors, top: int, bottom: int
) -> torch.Tensor:
    """Some rows, from the tensors as they would lie in a file."""
    stored = {
        part: Stored(
            file=0,
            tensor=TensorSpec(
                name=part,
                dtype=DTYPE_NAMES[tensor.dtype],
                shape=tuple(tensor.shape),
                offset=0,
                nbytes=tensor.nbytes,
            ),
        )
        for part, tensor in parts.items()
    }
    module = PackedModule(
        path="m",
        parts=stored,
        where="here",
        read=lambda one: parts[one.tensor.name].numpy().tobytes(),
    )
    decoding = decoding_of(module)
    loaded = decoding.load(lambda one: parts[one.tensor.name])
    assert DTYPE_NAMES[loaded.rows(top, bottom).dtype] == decoding.dtype
    assert decoding.shape[1] == loaded.rows(top, bottom).shape[1]
    return loaded.rows(top, bottom)

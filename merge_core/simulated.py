"""Which weights of a base QLoRA rounds to NF4 while it trains an adapter on it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from merge_core.decoding.nf4 import BLOCK, Nf4Rounding
from merge_core.decoding.stored import Stored
from merge_core.errors import InputError, Problem, counted, refuse, shortened
from merge_core.layout import TensorSpec
from merge_core.quantised import Decodings, Read, quantisation_of

_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Every nn.Linear of a dense Qwen2 but the head, which transformers leaves as it is."""

_FLOATS = frozenset({"F16", "BF16", "F32"})


def round_to_nf4(
    config: Mapping[str, Any], tensors: Sequence[Stored], read: Read, where: str
) -> Decodings:
    """Round them all, whether an adapter touches them or not: so did the training.

    Args: see ``quantised.read_packed``.

    Raises:
        InputError: the base is none that this is known of.
    """
    del read
    if quantisation_of(config) is not None:
        what = "the base is quantised itself: its own values are what the training saw"
        raise refuse(what, where, "Give --dequantize instead of --simulate-nf4")
    if config.get("model_type") != "qwen2":
        what = f"which layers of {shortened(config.get('model_type'))} are rounded is not known"
        raise refuse(what, where, "Leave --simulate-nf4 out")
    ends = tuple(f".{module}.weight" for module in _LINEAR)
    linear = [stored for stored in tensors if stored.tensor.name.endswith(ends)]
    problems = [
        Problem(f"tensor {stored.tensor.name!r} {wrong}", where, "Leave --simulate-nf4 out")
        for stored in linear
        if (wrong := _unfit(stored.tensor)) is not None
    ]
    if problems:
        raise InputError(problems)
    note = f"{counted(len(linear), 'weight')} of the base rounded to NF4, blocks of {BLOCK}"
    return Decodings(
        by_name={stored.tensor.name: Nf4Rounding(weight=stored) for stored in linear},
        parts=frozenset(stored.tensor.name for stored in linear),
        dtype=None,
        notes=(f"{note}, double quantisation",),
    )


def _unfit(tensor: TensorSpec) -> str | None:
    if tensor.dtype not in _FLOATS or len(tensor.shape) != 2:
        return f"is {tensor.dtype} {list(tensor.shape)}, not a matrix of values"
    if not tensor.nbytes or math.prod(tensor.shape) % BLOCK:
        return f"is {list(tensor.shape)}, not a multiple of {BLOCK} elements"
    return None

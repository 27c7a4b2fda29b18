"""Which weights of a base QLoRA rounds to NF4 while it trains an adapter on it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from merge_core.decoding.nf4 import BLOCK, Nf4Rounding
from merge_core.decoding.stored import Stored
from merge_core.errors import InputError, Problem, counted, refuse, shortened
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
    problems, by_name = [], {}
    for stored in tensors:
        tensor = stored.tensor
        if not tensor.name.endswith(tuple(f".{module}.weight" for module in _LINEAR)):
            continue
        if tensor.dtype not in _FLOATS or len(tensor.shape) != 2:
            what = f"is {tensor.dtype} {list(tensor.shape)}, not a matrix of values"
        elif not math.prod(tensor.shape) or math.prod(tensor.shape) % BLOCK:
            what = f"is {list(tensor.shape)}, which is no multiple of {BLOCK} elements"
        else:
            by_name[tensor.name] = Nf4Rounding(weight=stored)
            continue
        remedy = "Leave --simulate-nf4 out"
        problems.append(Problem(f"tensor {tensor.name!r} {what}", where, remedy))
    if problems:
        raise InputError(problems)
    note = f"{counted(len(by_name), 'weight')} of the base rounded to NF4, blocks of {BLOCK}"
    return Decodings(
        by_name=by_name,
        parts=frozenset(by_name),
        dtype=None,
        notes=(f"{note}, double quantisation",),
    )

"""Which way a base tensor lies: [out, in] as nn.Linear stores it, or [in, out] as Conv1D does."""

from __future__ import annotations

from merge_core.adapter import Adapter
from merge_core.architecture import CONV1D_MODELS, LINEAR_MODELS
from merge_core.checkpoint import Checkpoint
from merge_core.errors import refuse
from merge_core.layout import MERGEABLE, TensorSpec


def check_mergeable(base: TensorSpec, at: str) -> None:
    """Make sure that a tensor can be changed.

    Raises:
        InputError: its dtype takes no delta.
    """
    if base.dtype not in MERGEABLE:
        remedy = "Use a base in bf16, fp16 or fp32"
        raise refuse(f"the base tensor is {base.dtype}, which takes no delta", at, remedy)


def is_transposed(
    shape: tuple[int, ...],
    delta: tuple[int, int],
    adapter: Adapter,
    checkpoint: Checkpoint,
    at: str,
) -> bool:
    """Whether a base tensor of ``shape`` is [in, out], for a delta of [out, in].

    PEFT decides by the layer's class (nn.Linear or Conv1D). Without classes the model type and the
    shapes say the same. fan_in_fan_out says it only for models of linear layers alone: PEFT
    corrects it while it wraps layers, so in a model of both kinds the adapter carries what the last
    of them was.
    """
    model = checkpoint.config.get("model_type")
    flag = adapter.config.fan_in_fan_out and model not in LINEAR_MODELS
    square, conv1d = delta[0] == delta[1], model in CONV1D_MODELS
    if shape == delta and not (square and (conv1d or flag)):
        return False
    if shape == delta[::-1] and conv1d:
        return True
    if shape == delta[::-1] and flag:
        if not square:
            return True
        raise refuse(
            f"fan_in_fan_out is set, and nothing tells which way a square tensor of {model!r} lies",
            at,
            "Merge this adapter with PEFT's merge_and_unload",
        )
    raise refuse(
        f"the delta is {list(delta)}, the base tensor {list(shape)}",
        at,
        "Give the base that this adapter was trained on",
    )

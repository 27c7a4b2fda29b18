"""What an adapter does to a base tensor: one module a kind of update.

Each has a record for the plan (which tensors of the adapter it reads, and what the arithmetic needs
to know), and what becomes of it on the device, where it does its part on rows of the tensor.
"""

from __future__ import annotations

from merge_core.updates.combined import CombinedUpdate
from merge_core.updates.dora import DoraUpdate
from merge_core.updates.factor import Factor
from merge_core.updates.low_rank import LowRankUpdate
from merge_core.updates.rows import RowsUpdate
from merge_core.updates.shift import ShiftUpdate
from merge_core.updates.stacked import StackedUpdate
from merge_core.updates.through_peft import PeftUpdate

SingleUpdate = LowRankUpdate | StackedUpdate | ShiftUpdate | DoraUpdate | RowsUpdate | PeftUpdate
"""Of one adapter."""

Update = SingleUpdate | CombinedUpdate

__all__ = [
    "CombinedUpdate",
    "DoraUpdate",
    "Factor",
    "LowRankUpdate",
    "PeftUpdate",
    "RowsUpdate",
    "ShiftUpdate",
    "SingleUpdate",
    "StackedUpdate",
    "Update",
]

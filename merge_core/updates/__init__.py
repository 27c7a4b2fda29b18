"""What an adapter does to a base tensor: one module a kind of update.

Each has a record for the plan (which tensors of the adapter it reads, and what the arithmetic needs
to know), and what becomes of it on the device, where it does its part on rows of the tensor.
"""

from __future__ import annotations

from merge_core.updates.dora import DoraUpdate
from merge_core.updates.low_rank import LowRankUpdate
from merge_core.updates.rows import RowsUpdate
from merge_core.updates.shift import ShiftUpdate
from merge_core.updates.through_peft import PeftUpdate

Update = LowRankUpdate | ShiftUpdate | DoraUpdate | RowsUpdate | PeftUpdate

__all__ = ["DoraUpdate", "LowRankUpdate", "PeftUpdate", "RowsUpdate", "ShiftUpdate", "Update"]

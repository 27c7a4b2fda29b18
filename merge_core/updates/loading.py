"""What an update may ask for while it is brought to the device."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

from merge_core.layout import TensorSpec
from merge_core.updates.factor import Factor

if TYPE_CHECKING:
    import torch


class Loading(Protocol):
    """The inputs of one tensor's updates, on one worker."""

    def factor(self, adapter: int, tensor: TensorSpec) -> torch.Tensor:
        """A tensor of an adapter, in float32 on the device."""
        ...

    def matrix(self, adapter: int, factor: Factor) -> torch.Tensor:
        """A factor of an adapter, in float32 on the device."""
        ...

    def base_rows(self) -> Iterator[tuple[int, torch.Tensor]]:
        """The whole base tensor in float32 on the device, some rows at a time, each time with the
        number of the first.
        """
        ...

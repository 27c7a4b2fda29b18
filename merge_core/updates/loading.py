"""What an update may ask for while it is brought to the device."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

from merge_core.layout import TensorSpec
from merge_core.stores.location import Location
from merge_core.updates.factor import Factor
from merge_core.updates.tuning import Tuning

if TYPE_CHECKING:
    import torch


class Loading(Protocol):
    """The inputs of one tensor's updates, on one worker."""

    def factor(self, adapter: int, tensor: TensorSpec) -> torch.Tensor:
        """A tensor of an adapter on the device: integers as they are, all else in float32."""
        ...

    def matrix(self, adapter: int, factor: Factor) -> torch.Tensor:
        """A factor of an adapter, in float32 on the device."""
        ...

    def base_rows(self) -> Iterator[tuple[int, torch.Tensor]]:
        """The whole base tensor in float32 on the device, some rows at a time, each time with the
        number of the first.
        """
        ...

    def whole(self, name: str | None = None) -> torch.Tensor:
        """The whole base tensor, or that of another name, in float32 on the device."""
        ...

    def tuning(self, adapter: int) -> Tuning:
        """What all updates of an adapter share that PEFT merges."""
        ...

    def path(self, adapter: int) -> Location:
        """The adapter's folder, for messages."""
        ...

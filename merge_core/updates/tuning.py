"""What all updates of one adapter share that PEFT itself merges: its config, layers and tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from typing import Any, Literal

from merge_core.layout import TensorSpec

_DEFAULT_RANK = 4
"""Of tuners that look at all others; PEFT's own are 4 and 2, and are in every config it writes."""

Part = Literal["weight", "bias"]
"""A tensor of a layer."""


class Kind(StrEnum):
    """The class of a layer, which decides what a tuner makes of it."""

    LINEAR = "linear"
    """nn.Linear: [out, in]."""
    CONV1D = "Conv1D"
    """transformers' Conv1D: [in, out]."""
    EMBEDDING = "embedding"
    """nn.Embedding: [vocabulary, dim]."""


class Others(StrEnum):
    """Which other layers a tuner must see to make the right thing of one."""

    NONE = "none"
    SHAPES = "one of each shape"
    """Its projections are as large as the largest layer asks for."""
    ALL = "all"
    """It deals out one vector among all of them."""
    NUMBER = "the number of them"
    """It numbers its layers."""


def rank_of(config: Mapping[str, Any]) -> int:
    """``r``; also where an old config leaves it out."""
    return config.get("r") or _DEFAULT_RANK


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """A module that an adapter was trained on."""

    path: str
    """Such as ``model.layers.0.self_attn.q_proj``."""
    kind: Kind
    shape: tuple[int, ...]
    """Of its weight."""
    bias: bool
    """Whether it has one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
    """An adapter whose layers PEFT merges."""

    config: Mapping[str, Any]
    """The fields of its adapter_config.json that decide the arithmetic."""
    layers: tuple[Layer, ...]
    """All that it was trained on, in the order of the model."""
    others: Others
    peft: str
    """Version of PEFT beside which it was planned: the result may depend on it."""
    shared: tuple[TensorSpec, ...] = ()
    """Tensors of no module."""
    copies: int = 0
    squares: int = 0
    """What a layer takes in memory, see ``tuner.Tuner``."""
    always: int = 0
    """Float32 numbers that are in memory with any layer."""

    @property
    def arithmetic(self) -> dict[str, Any]:
        """All of it but what a layer takes in memory, which changes no byte of the result."""
        fields = asdict(self)
        return {name: fields[name] for name in fields.keys() - {"copies", "squares", "always"}}

    def around(self, chosen: Layer) -> Iterator[Layer]:
        """``chosen`` and the others that must be there with it, in order."""
        seen, rank = {chosen.shape}, rank_of(self.config)
        for layer in self.layers:
            if layer == chosen or self.others == Others.ALL:
                yield layer
            elif self.others == Others.NUMBER:
                yield replace(layer, shape=tuple(min(n, rank) for n in layer.shape))
            elif self.others == Others.SHAPES and layer.shape not in seen:
                seen.add(layer.shape)
                yield layer

    def elements(self, layer: Layer) -> int:
        """Float32 numbers that are in memory at once while PEFT merges a layer."""
        rows, width = layer.shape
        return self.copies * rows * width + self.squares * max(rows, width) ** 2 + self.always

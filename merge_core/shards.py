"""Cutting the output into shards: one safetensors file, one unit of work, of retry, of resume.

The cut depends on the list of output tensors, the size limit and the device map alone, never on how
many workers there are, so that the same command gives the same files on any cluster.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from merge_core.layout import tensor_bytes

_LAYER = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputTensor:
    """Name, dtype and shape of a tensor that the merged checkpoint will hold."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    device: str | None = None
    """Where alone it may be merged, from a device map."""

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return tensor_bytes(self.dtype, self.shape)


def cut_shards(tensors: Iterable[OutputTensor], limit: int) -> list[list[OutputTensor]]:
    """Group ``tensors`` into shards of at most ``limit`` bytes, cut at layer borders.

    A layer, or a tensor outside the layers, that is larger than the limit is a shard of its own.
    Where a device map has the device change, a shard ends, be it inside a layer.
    """
    shards: list[list[OutputTensor]] = []
    room = -1
    for unit in _units(tensors):
        size = sum(tensor.nbytes for tensor in unit)
        if size > room or shards[-1][0].device != unit[0].device:
            shards.append([])
            room = limit
        shards[-1].extend(unit)
        room -= size
    return shards


def shard_name(number: int, total: int) -> str:
    """File name of shard ``number``, counted from 1, as transformers names it."""
    if total == 1:
        return "model.safetensors"
    return f"model-{number:05}-of-{total:05}.safetensors"


def layer_of(name: str) -> int | None:
    """Index of the layer that the tensor belongs to, None for embeddings, final norm and head."""
    match = _LAYER.search(name)
    return int(match[1]) if match else None


def _units(tensors: Iterable[OutputTensor]) -> list[list[OutputTensor]]:
    """What must stay together, in the order of a forward pass: embeddings, layers, the rest."""
    groups: dict[tuple[int, int, str, str], list[OutputTensor]] = {}
    for tensor in sorted(tensors, key=lambda t: t.name):
        layer = layer_of(tensor.name)
        if layer is not None:
            key = (1, layer, tensor.device or "", "")
        elif "embed" in tensor.name:
            key = (0, 0, "", tensor.name)
        else:
            key = (2, 0, "", tensor.name)
        groups.setdefault(key, []).append(tensor)
    # "norm" sorts behind "lm_head", yet a forward pass meets it first: small ones go first.
    order = sorted(groups, key=lambda k: (*k[:3], sum(t.nbytes for t in groups[k]), k[3]))
    return [groups[key] for key in order]

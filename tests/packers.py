"""Quantised checkpoints, packed in numpy from the definition of each format: nothing in here is
shared with what decodes them. Every number is placed bit by bit into one long integer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from handmade import GEOMETRY, Geometry, random_tensors, write_base
from oracles import Tensors

Numbers = npt.NDArray[np.int64]
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which column of eight stands at each place of a word."""


@dataclass(frozen=True, kw_only=True)
class Packed:
    """One packed weight."""

    parts: Tensors
    """By what stands behind the module's path."""
    weight: torch.Tensor
    """[out, in], what a reader of the format computes with."""


def words_of(column: Numbers, bits: int) -> list[int]:
    """The numbers one after another from the lowest bit of the first word on."""
    text = "".join(format(int(number), f"0{bits}b")[::-1] for number in column)
    return [int(text[n : n + 32][::-1], 2) for n in range(0, len(text), 32)]


def pack_columns(numbers: Numbers, bits: int) -> torch.Tensor:
    """[n, m] to int32 [n * bits / 32, m]."""
    columns = [words_of(numbers[:, n], bits) for n in range(numbers.shape[1])]
    return torch.from_numpy(np.array(columns, np.uint32).T.copy().view(np.int32))


@dataclass(frozen=True, kw_only=True)
class Gptq:
    """How to quantise."""

    bits: int = 4
    group: int = 16
    second: bool = False
    """checkpoint_format gptq_v2"""
    shuffled: bool = False
    """Columns belong to groups in no order, as desc_act makes them."""
    without_index: bool = False
    scales: torch.dtype = torch.float16

    @property
    def config(self) -> dict[str, Any]:
        said = {"checkpoint_format": "gptq_v2"} if self.second else {}
        fields = {"bits": self.bits, "group_size": self.group, "desc_act": self.shuffled}
        return {"quant_method": "gptq", "sym": False, "true_sequential": True, **fields, **said}

    def pack(self, out: int, width: int, seed: int) -> Packed:
        random = np.random.default_rng(seed)
        size = width if self.group == -1 else self.group
        count = -(-width // size)
        numbers = random.integers(0, 1 << self.bits, (width, out))
        zeros = random.integers(0 if self.second else 1, 1 << self.bits, (count, out))
        groups = np.arange(width) // size
        if self.shuffled:
            groups = random.permutation(groups)
        scales = torch.from_numpy(random.uniform(1e-3, 4e-3, (count, out))).to(self.scales)
        parts = {
            "qweight": pack_columns(numbers, self.bits),
            "qzeros": pack_columns((zeros - (not self.second)).T, self.bits).T.contiguous(),
            "scales": scales,
            "g_idx": torch.from_numpy(groups.astype(np.int32)),
        }
        if self.without_index:
            del parts["g_idx"]
        difference = torch.from_numpy(numbers - zeros[groups]).double()
        exact = difference * scales[torch.from_numpy(groups)].double()
        return Packed(parts=parts, weight=exact.to(self.scales).T.contiguous())


@dataclass(frozen=True, kw_only=True)
class QuantisedBase:
    """A checkpoint on disk, and what its weights are."""

    path: Path
    weights: Tensors
    """All of them, packed ones decoded."""


def write_quantised(
    path: Path,
    config: Mapping[str, Any],
    pack: Callable[[int, int, int], Packed],
    geometry: Geometry = GEOMETRY,
    *,
    dtype: torch.dtype = torch.float16,
    files: int = 2,
    more: Mapping[str, torch.Tensor] | None = None,
) -> QuantisedBase:
    """A Qwen1.5 checkpoint of which every linear layer but the head is packed."""
    tensors = random_tensors(geometry, dtype)
    weights = dict(tensors)
    for seed, (module, (out, width)) in enumerate(geometry.linear.items()):
        packed = pack(out, width, seed)
        del tensors[f"{module}.weight"]
        tensors |= {f"{module}.{part}": tensor for part, tensor in packed.parts.items()}
        weights[f"{module}.weight"] = packed.weight
    name = str(dtype).removeprefix("torch.")
    said = {**geometry.config, "torch_dtype": name, "quantization_config": dict(config)}
    write_base(path, {**tensors, **(more or {})}, said, files)
    return QuantisedBase(path=path, weights=weights)

"""Quantised checkpoints, packed in numpy from the definition of each format: nothing in here is
shared with what decodes them. Every number is placed bit by bit.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
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
class Awq:
    """How to quantise."""

    group: int = 16
    scales: torch.dtype = torch.float16

    @property
    def config(self) -> dict[str, Any]:
        fields = {"bits": 4, "group_size": self.group, "zero_point": True, "version": "gemm"}
        return {"quant_method": "awq", "modules_to_not_convert": None, **fields}

    def pack(self, out: int, width: int, seed: int) -> Packed:
        random = np.random.default_rng(seed)
        size = width if self.group == -1 else self.group
        numbers = random.integers(0, 16, (width, out))
        zeros = random.integers(0, 16, (width // size, out))
        scales = torch.from_numpy(random.uniform(1e-3, 4e-3, zeros.shape)).to(self.scales)
        parts = {"qweight": in_order(numbers), "qzeros": in_order(zeros), "scales": scales}
        of = np.arange(width) // size
        exact = (
            torch.from_numpy(numbers - zeros[of]).double() * scales[torch.from_numpy(of)].double()
        )
        return Packed(parts=parts, weight=exact.to(self.scales).T.contiguous())


def in_order(numbers: Numbers) -> torch.Tensor:
    """[n, m] to int32 [n, m / 8], in AWQ's order."""
    moved = numbers.reshape(len(numbers), -1, 8)[..., list(AWQ_ORDER)].reshape(numbers.shape)
    return pack_columns(moved.T, 4).T.contiguous()


@dataclass(frozen=True, kw_only=True)
class AwqGemv:
    """How to quantise."""

    group: int = 32
    fast: bool = False
    scales: torch.dtype = torch.float16

    @property
    def config(self) -> dict[str, Any]:
        fields = {"bits": 4, "group_size": self.group, "zero_point": True}
        return {"quant_method": "awq", "version": "gemv_fast" if self.fast else "GEMV", **fields}

    def pack(self, out: int, width: int, seed: int) -> Packed:
        random = np.random.default_rng(seed)
        groups = width // self.group
        room = 8
        while room < groups or (room * self.group % 1024 and self.group < 128):
            room += 8
        numbers = random.integers(0, 16, (out, width))
        zeros = random.integers(0, 16, (out, groups))
        scales = torch.from_numpy(random.uniform(1e-3, 4e-3, (out, groups))).to(self.scales)
        of = np.arange(width) // self.group
        padding = torch.zeros(out, room - groups, dtype=self.scales)
        wide = torch.cat([scales, padding], 1)
        if self.fast:
            scaled = (-torch.from_numpy(zeros) * scales.float()).to(self.scales)
            exact = torch.from_numpy(numbers) * scales.double()[:, of] + scaled.double()[:, of]
            parts = {
                "qweight": interleaved(numbers),
                "scales": wide.T.contiguous(),
                "scaled_zeros": torch.cat([scaled, padding], 1).T.contiguous(),
            }
        else:
            exact = torch.from_numpy(numbers - zeros[:, of]) * scales.double()[:, of]
            filled = np.concatenate([zeros, np.zeros((out, room - groups), np.int64)], 1)
            parts = {
                "qweight": pack_columns(numbers.T, 4).T.contiguous(),
                "qzeros": pack_columns(filled.T, 4).T.contiguous(),
                "scales": wide,
            }
        return Packed(parts=parts, weight=exact.to(self.scales))


def interleaved(numbers: Numbers) -> torch.Tensor:
    """[n, m] to int16 [n / 4, m], word by word as the packer of llm-awq goes about it: columns in
    pairs from each eighth of 32, the even ones of eight before the odd, 64 columns of four rows one
    behind another, four numbers in a word.
    """
    rows, width = numbers.shape
    pairs = [n for start in range(0, 8, 2) for n in range(start, 32, 8)]
    order = [one for pair in pairs for one in (pair, pair + 1)]
    order = [order[8 * n + place] for n in range(4) for place in (0, 2, 4, 6, 1, 3, 5, 7)]
    found = []
    for top in range(0, rows, 4):
        line: list[int] = []
        for left in range(0, width, 64):
            for row in numbers[top : top + 4, left : left + 64]:
                line += [row[32 * half + place] for half in (0, 1) for place in order]
        found.append(
            [
                sum(int(n) << 4 * k for k, n in enumerate(line[w : w + 4]))
                for w in range(0, len(line), 4)
            ]
        )
    return torch.from_numpy(np.array(found, np.uint16).view(np.int16))


@dataclass(frozen=True, kw_only=True)
class Fp8:
    """How to quantise."""

    block: tuple[int, int] | None = (32, 16)
    scales: torch.dtype = torch.bfloat16

    @property
    def config(self) -> dict[str, Any]:
        fields = {"activation_scheme": "dynamic", "fmt": "e4m3"}
        block = None if self.block is None else list(self.block)
        return {"quant_method": "fp8", "weight_block_size": block, **fields}

    def pack(self, out: int, width: int, seed: int) -> Packed:
        random = np.random.default_rng(seed)
        values = torch.from_numpy(random.normal(0, 20, (out, width))).to(torch.float8_e4m3fn)
        high, wide = self.block or (out, width)
        grid = (-(-out // high), -(-width // wide)) if self.block else ()
        scale = torch.from_numpy(np.array(random.uniform(1e-3, 2e-3, grid))).to(self.scales)
        cells = scale.double().reshape(-1, -(-width // wide)).numpy()
        exact = np.kron(cells, np.ones((high, wide)))[:out, :width] * values.double().numpy()
        weight = torch.from_numpy(exact).float()
        return Packed(parts={"weight": values, "weight_scale_inv": scale}, weight=weight)


Format = Gptq | Awq | AwqGemv | Fp8


@dataclass(frozen=True, kw_only=True)
class QuantisedBase:
    """A checkpoint on disk, and what its weights are."""

    path: Path
    weights: Tensors
    """All of them, packed ones decoded."""
    how: Format
    """It was packed with."""


@functools.cache
def _packed(how: Format, out: int, width: int, seed: int) -> Packed:
    """Bit by bit is slow, and the same bases are written often."""
    return how.pack(out, width, seed)


def write_quantised(
    path: Path,
    how: Format,
    geometry: Geometry = GEOMETRY,
    *,
    dtype: torch.dtype = torch.float16,
    files: int = 2,
    change: Callable[[Tensors], object] = dict,
    others: Mapping[str, Format | None] = MappingProxyType({}),
    **fields: Any,
) -> QuantisedBase:
    """A Qwen1.5 checkpoint of which every linear layer but the head is packed.

    ``change`` may spoil the tensors before they are written. Of ``others`` each module is packed in
    its own way, or not at all; ``fields`` of the quantization_config may say so.
    """
    tensors = random_tensors(geometry, dtype)
    weights = dict(tensors)
    for seed, (module, (out, width)) in enumerate(geometry.linear.items()):
        mine = others.get(module, how)
        if mine is None:
            continue
        packed = _packed(mine, out, width, seed)
        del tensors[f"{module}.weight"]
        tensors |= {f"{module}.{part}": tensor.clone() for part, tensor in packed.parts.items()}
        weights[f"{module}.weight"] = packed.weight
    name = str(dtype).removeprefix("torch.")
    said = {**geometry.config, "torch_dtype": name, "quantization_config": {**how.config, **fields}}
    change(tensors)
    write_base(path, tensors, said, files)
    return QuantisedBase(path=path, weights=weights, how=how)

"""Whole numbers of a few bits, packed into 32-bit words from the lowest bit on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def unpack(words: torch.Tensor, bits: int, order: Sequence[int] | None = None) -> torch.Tensor:
    """The numbers in each row of ``words``, in float32, which holds them exactly.

    Args:
        words: int32 [rows, words]; where ``bits`` does not divide 32, a number may begin in one
            word and end in the next.
        bits: of a number, at most 8.
        order: place within a word, in units of ``bits``, of its first number, of its second, ...;
            None: one after another.

    Returns:
        [rows, numbers].
    """
    import torch

    rows, count = words.shape
    step = bits // math.gcd(bits, 32)
    numbers = step * 32 // bits
    grouped, mask = words.reshape(rows, count // step, step), (1 << bits) - 1
    out = torch.empty((rows, count // step, numbers), dtype=torch.float32)
    for number, place in enumerate(order or range(numbers)):
        word, shift = divmod(place * bits, 32)
        value = grouped[..., word] >> shift
        if shift + bits > 32:
            have = 32 - shift
            value = (value & (1 << have) - 1) | grouped[..., word + 1] << have
        out[..., number] = value & mask
    return out.view(rows, -1)


def dequantise(
    numbers: torch.Tensor,
    zeros: torch.Tensor,
    scales: torch.Tensor,
    groups: torch.Tensor | None,
) -> torch.Tensor:
    """W = scale * (number - zero), rounded once to the dtype of the scales.

    The difference of two small whole numbers is exact, and so is its product with a 16-bit scale in
    float32: what is rounded is the value itself.

    Args:
        numbers: float32 [rows, width]; is overwritten.
        zeros: float32 [rows, groups].
        scales: [rows, groups].
        groups: int64 [width], the group of each column; None: equal ones, one after another.
    """
    factors = scales.float()
    if groups is None:
        split = numbers.view(len(numbers), zeros.shape[1], -1)
        split.sub_(zeros.unsqueeze(-1)).mul_(factors.unsqueeze(-1))
    else:
        numbers.sub_(zeros[:, groups]).mul_(factors[:, groups])
    return numbers.to(scales.dtype)

"""Combining what several adapters trained: task arithmetic, pruning, the election of signs.

The formulas are those of task arithmetic (arXiv:2212.04089), TIES (arXiv:2306.01708) and DARE
(arXiv:2311.03099), in the order of operations of PEFT's ``utils/merge_utils.py``, which shows in
the last bit. Everything is in float32, on the device of what comes in.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def weighted_sum(tensors: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """Sum of weight * tensor; all of one shape."""
    stacked, factors = _stacked(tensors, weights)
    return (stacked * factors).sum(dim=0)


def elected_sum(
    tensors: Sequence[torch.Tensor], weights: Sequence[float], *, by_size: bool
) -> torch.Tensor:
    """The mean of weight * element over those elements whose sign is that of the majority.

    Args:
        by_size: the majority is that of the sum of the elements, else that of their signs.
    """
    import torch

    stacked, factors = _stacked(tensors, weights)
    signs = stacked.sign()
    votes = (stacked if by_size else signs).sum(dim=0)
    agrees = signs == torch.where(votes >= 0, 1, -1)
    return (stacked * factors * agrees).sum(dim=0) / agrees.sum(dim=0).clamp(min=1.0)


def largest(tensor: torch.Tensor, density: float) -> torch.Tensor:
    """The share ``density`` of the elements that is largest in size, the others 0."""
    import torch

    if density >= 1:
        return tensor
    kept = torch.topk(tensor.abs().reshape(-1), k=int(density * tensor.numel())).indices
    mask = torch.zeros_like(tensor).reshape(-1)
    mask[kept] = 1
    return tensor * mask.reshape(tensor.shape)


def dropped(tensor: torch.Tensor, density: float, key: str) -> torch.Tensor:
    """Every element kept with probability ``density``, and then divided by it; the others 0."""
    if density >= 1:
        return tensor
    return tensor * random_mask(tensor.shape, density, key).to(tensor) / density


def random_mask(shape: Sequence[int], density: float, key: str) -> torch.Tensor:
    """Ones with probability ``density``, on the CPU: the same for a key on every device."""
    import torch

    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") >> 1
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(tuple(shape), generator=generator) < density


def truncated_product(
    left: torch.Tensor, right: torch.Tensor, rank: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The best approximation of left @ right of a rank, as its two factors, without the product.

    The singular values of a product of QR decompositions are those of the small matrix between
    them. In float64: what is truncated must not depend on the last bits.

    Args:
        left: [out, R]
        right: [R, in]

    Returns:
        [out, rank] and [rank, in] in float32.
    """
    import torch

    q, r = torch.linalg.qr(left.double())
    p, s = torch.linalg.qr(right.double().T)
    u, sizes, v = torch.linalg.svd(r @ s.T)
    a = v[:rank] @ p.T
    return (q @ (u[:, :rank] * sizes[:rank])).float(), a.float()


def truncated(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The best approximation of a matrix of a rank, as its two factors.

    Args:
        matrix: [out, in]

    Returns:
        [out, rank] and [rank, in].
    """
    import torch

    u, sizes, v = torch.linalg.svd(matrix, full_matrices=False)
    return u[:, :rank] * sizes[:rank], v[:rank]


def _stacked(
    tensors: Sequence[torch.Tensor], weights: Sequence[float]
) -> tuple[torch.Tensor, torch.Tensor]:
    import torch

    stacked = torch.stack(list(tensors))
    factors = torch.tensor(weights, dtype=stacked.dtype, device=stacked.device)
    return stacked, factors.view(-1, *[1] * (stacked.dim() - 1))

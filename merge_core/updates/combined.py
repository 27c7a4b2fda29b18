"""The factors of several adapters on one weight, combined as PEFT's ``add_weighted_adapter`` does.

Most methods work on A and B one by one, each with the square root of weight * scaling, so that the
product of what comes out is no sum of the deltas. Those that end in ``_svd`` work on the deltas
themselves and keep of the result what the largest rank among the adapters can hold.
"""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from merge_core.layout import TensorSpec
from merge_core.updates.arithmetic import (
    dropped,
    elected_sum,
    largest,
    truncated,
    truncated_product,
    weighted_sum,
)
from merge_core.updates.loading import Loading
from merge_core.updates.low_rank import LoadedLowRank, LowRankUpdate

if TYPE_CHECKING:
    import torch

_ONE_AT_A_TIME = threading.Lock()
"""Whole deltas take several times the memory of their tensor."""

Method = Literal[
    "sum",
    "linear",
    "cat",
    "svd",
    "ties",
    "dare_linear",
    "dare_ties",
    "magnitude_prune",
    "ties_svd",
    "dare_linear_svd",
    "dare_ties_svd",
    "magnitude_prune_svd",
]


SignMethod = Literal["total", "frequency"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Combination:
    """How the factors of several adapters become one."""

    method: Method = "sum"
    density: float | None = None
    """Share of the elements that pruning leaves, above 0, at most 1."""
    majority_sign: SignMethod | None = None
    """What elects a sign: the sum of the elements (where None), or how many there are."""
    seed: int | None = None
    """Of what DARE drops; None: 0."""

    @property
    def drops(self) -> bool:
        """Whether elements are dropped at random (DARE)."""
        return self.method.startswith("dare")

    @property
    def elects(self) -> bool:
        """Whether elements whose sign is the minority's are left out (TIES)."""
        return "ties" in self.method

    @property
    def prunes(self) -> bool:
        """Whether only a share of the elements is kept."""
        return self.drops or self.elects or self.method.startswith("magnitude")

    @property
    def truncates(self) -> bool:
        """Whether whole deltas are combined, and their result is cut to a rank."""
        return self.method.endswith("svd")


@dataclass(frozen=True, slots=True, kw_only=True)
class CombinedUpdate:
    """Adds the product of the combined factors."""

    how: Combination
    parts: tuple[LowRankUpdate, ...]
    """One an adapter, each with the adapter's own scaling, without its weight."""
    weights: tuple[float, ...]
    """Of the adapters."""
    rank: int
    """Of the combined factors."""
    tensor: str
    """Name of the base tensor; with the seed it decides what is dropped."""
    kind: Literal["combined"] = "combined"

    @property
    def tensors(self) -> tuple[TensorSpec, ...]:
        """What it reads of the adapters."""
        return tuple(tensor for part in self.parts for tensor in part.tensors)

    @property
    def elements(self) -> int:
        """What it holds on the device while it is loaded, in float32."""
        factors = sum(part.elements for part in self.parts)
        return 7 * factors  # as they are, stacked, weighted and masked, or in float64

    @property
    def alone_elements(self) -> int:
        """What whole deltas take meanwhile: every one and its mask, all of them stacked and
        weighted, and LAPACK's copies.
        """
        if not self._is_whole:
            return 0
        return (3 * len(self.parts) + 6) * math.prod(self.parts[0].shape)

    @property
    def _is_whole(self) -> bool:
        return self.how.truncates and self.how.method != "svd"

    def load(self, inputs: Loading) -> LoadedLowRank:
        """The combined factors, on the device.

        All but whole deltas are combined on the CPU, so that every device gets the same.
        """
        first = self.parts[0]
        loaded = [part.load(inputs) for part in self.parts]
        device = loaded[0].a.device
        if self._is_whole:
            with _ONE_AT_A_TIME:
                b, a = self._truncated(loaded)
        else:
            b, a = self._of_factors([(one.a.cpu(), one.b.cpu()) for one in loaded])
        return LoadedLowRank(
            a=a.to(device).contiguous(),
            b=b.to(device).contiguous(),
            scaling=1.0,
            transposed=first.transposed,
        )

    def _of_factors(
        self, pairs: list[tuple[torch.Tensor, torch.Tensor]]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """B and A from the factors themselves."""
        import torch

        scalings = [part.scaling for part in self.parts]
        if self.how.method in ("cat", "svd"):
            right = torch.cat(
                [a * w * s for (a, _), w, s in zip(pairs, self.weights, scalings, strict=True)]
            )
            left = torch.cat([b for _, b in pairs], dim=1)
            if self.how.method == "cat":
                return left, right
            return truncated_product(left, right, self.rank)
        scales = [w * s for w, s in zip(self.weights, scalings, strict=True)]
        roots = [math.sqrt(abs(scale)) for scale in scales]
        signed = [math.copysign(root, scale) for root, scale in zip(roots, scales, strict=True)]
        return (
            self._combined([b for _, b in pairs], roots, "B"),
            self._combined([a for a, _ in pairs], signed, "A"),
        )

    def _truncated(self, loaded: list[LoadedLowRank]) -> tuple[torch.Tensor, torch.Tensor]:
        """B and A from whole deltas, on their device."""
        deltas = [(one.b @ one.a).mul_(one.scaling) for one in loaded]
        return truncated(self._combined(deltas, self.weights, "delta"), self.rank)

    def _combined(
        self, tensors: list[torch.Tensor], weights: tuple[float, ...] | list[float], what: str
    ) -> torch.Tensor:
        density = self.how.density or 1.0
        if self.how.drops:
            tensors = [
                dropped(
                    one, density, f"{self.how.seed or 0}\n{self.tensor}\n{what}\n{part.adapter}"
                )
                for one, part in zip(tensors, self.parts, strict=True)
            ]
        elif self.how.prunes:
            tensors = [largest(one, density) for one in tensors]
        if self.how.elects:
            by_size = self.how.majority_sign != "frequency"
            return elected_sum(tensors, weights, by_size=by_size)
        return weighted_sum(tensors, weights)

"""What a merge must give: PEFT's order of operations, and float64 rounded once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """scaling * B @ A, transposed where the base stores [in, out]."""

    a: torch.Tensor
    b: torch.Tensor
    scaling: float
    transposed: bool = False

    def product(self, dtype: torch.dtype) -> torch.Tensor:
        """B @ A, then transposed, then scaled, all of it in ``dtype``."""
        whole = self.b.to(dtype) @ self.a.to(dtype)
        return (whole.T if self.transposed else whole) * self.scaling


Deltas = Mapping[str, Sequence[Delta]]
Term = tuple[torch.Tensor, torch.Tensor, float]
"""A, B and the scale of B @ A."""


def merged_like_peft(base: Tensors, deltas: Deltas) -> Tensors:
    """What ``merge_and_unload()`` does with one adapter: ``weight.data += delta``."""
    merged = {name: tensor.clone() for name, tensor in base.items()}
    for name, (delta,) in deltas.items():
        merged[name] += delta.product(torch.float32)
    return merged


def plain_sum(base: torch.Tensor, terms: Sequence[Term]) -> torch.Tensor:
    """As PEFT does it."""
    total = sum(((b.float() @ a.float()) * s for a, b, s in terms), torch.zeros(()))
    return base.float() + total


def merged_exactly(base: Tensors, deltas: Deltas, dtype: torch.dtype | None = None) -> Tensors:
    """All deltas summed in float64, then rounded once; ``dtype`` converts every tensor."""
    merged = {}
    for name, tensor in base.items():
        exact = tensor.double()
        for delta in deltas.get(name, ()):
            exact = exact + delta.product(torch.float64)
        merged[name] = round_once(exact, dtype or tensor.dtype)
    return merged


def round_once(exact: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """float64 to ``dtype`` with one rounding; torch goes through float32, which makes it two.

    So float32 gets the value rounded to odd: the last bit says that something was cut off, and
    the second rounding comes out as if it had seen all bits.
    """
    nearest = exact.float()
    if dtype == torch.float32:
        return nearest
    bits = nearest.view(torch.int32) - (nearest.double().abs() > exact.abs()).int()
    inexact = bits.view(torch.float32).double() != exact
    return (bits | inexact.int()).view(torch.float32).to(dtype)


def steps_between(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """How many representable values apart two tensors are, element by element."""
    return (_ordinal(one) - _ordinal(other)).abs()


def _ordinal(values: torch.Tensor) -> torch.Tensor:
    wide = values.element_size() == 4
    bits = values.view(torch.int32 if wide else torch.int16).long()
    magnitude = bits & (0x7FFF_FFFF if wide else 0x7FFF)
    return torch.where(bits < 0, -magnitude, magnitude)


IDENTICAL = {torch.bfloat16: 0.9999, torch.float16: 0.9995}
"""Share of merged elements that come out as from float64, for deltas that are small against the
base, as trained ones are. A float32 sum is off by 2^-25 on average, so it lands on the other side
of a border in one of 2^16 elements where the step is 2^-8, and in one of 2^13 where it is 2^-11."""


def assert_within_contract(
    got: Tensors, base: Tensors, deltas: Deltas, dtype: torch.dtype | None = None, slack: float = 1
) -> None:
    """``got`` is float64 rounded once, but for what float32 arithmetic cannot know.

    What is more than one step off must be off by float32 noise only: where base and delta cancel,
    the step of what is left is smaller than the noise of both. In float32 the noise shows in the
    last bits, so there only the noise is bounded.
    """
    exact = merged_exactly(base, deltas, dtype)
    assert got.keys() == exact.keys()
    elements = different = 0
    for name, wanted in exact.items():
        assert (got[name].dtype, got[name].shape) == (wanted.dtype, wanted.shape), name
        steps = steps_between(got[name], wanted)
        if name not in deltas:
            assert not steps.any(), name
            continue
        off = (got[name].double() - wanted.double()).abs()
        assert torch.all((steps <= 1) | (off <= _noise(base[name], deltas[name]))), name
        elements, different = elements + steps.numel(), different + int((steps > 0).sum())
    identical = min(IDENTICAL.get(tensor.dtype, 0.0) for tensor in exact.values())
    assert different <= 1 + slack * (1 - identical) * elements


def _noise(base: torch.Tensor, deltas: Sequence[Delta]) -> torch.Tensor:
    """What float32 sums of these terms may be off by."""
    terms = base.double().abs()
    for delta in deltas:
        whole = delta.b.double().abs() @ delta.a.double().abs() * abs(delta.scaling)
        terms = terms + (whole.T if delta.transposed else whole) * (1 + len(delta.a) / 8)
    return terms * 2.0**-22

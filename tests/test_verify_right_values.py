"""The numeric comparison raises no false alarm: any right merge of a tensor passes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from merged_by_hand import FLOATS, compare
from oracles import Term, plain_sum

# Each example overwrites the files of the one before.
SAME_TMP_PATH = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def scaled_first(base: torch.Tensor, terms: Sequence[Term]) -> torch.Tensor:
    """As unsloth and tinker do it: one term into the other, from the last."""
    total = base.float()
    for a, b, s in reversed(terms):
        total = total + (b.float() * s) @ a.float()
    return total


def one_by_one(base: torch.Tensor, terms: Sequence[Term]) -> torch.Tensor:
    """The least exact order of summation that is still float32: one product after the other."""
    total = torch.zeros(base.shape)
    for a, b, s in terms:
        product = torch.zeros(base.shape)
        for k in range(a.shape[0]):
            product = product + b.float()[:, k : k + 1] * a.float()[k : k + 1]
        total = total + product * s
    return base.float() + total


@st.composite
def merges(draw: st.DrawFn) -> tuple[torch.Tensor, list[Term], torch.dtype]:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    rows, cols = draw(st.integers(1, 40)), draw(st.integers(1, 40))

    def matrix(*shape: int) -> torch.Tensor:
        values = torch.randn(shape, generator=generator) * 2.0 ** draw(st.integers(-12, 3))
        return values.to(draw(st.sampled_from(FLOATS)))

    ranks = draw(st.lists(st.integers(1, 64), min_size=1, max_size=3))
    scales = st.floats(0.01, 8) | st.floats(-8, -0.01)
    terms = [(matrix(r, cols), matrix(rows, r), draw(scales)) for r in ranks]
    return matrix(rows, cols), terms, draw(st.sampled_from(FLOATS))


@settings(SAME_TMP_PATH, max_examples=400)
@given(merges(), st.sampled_from([plain_sum, scaled_first, one_by_one]))
def test_a_right_merge_is_never_called_wrong(
    tmp_path: Path,
    merge: tuple[torch.Tensor, list[Term], torch.dtype],
    add: Callable[[torch.Tensor, Sequence[Term]], torch.Tensor],
) -> None:
    base, terms, dtype = merge
    out = add(base, terms).to(dtype)

    findings = compare(tmp_path, out, base, terms)

    assert [f.check for f in findings] == ["finite"] * (not out.isfinite().all())


@SAME_TMP_PATH
@given(
    st.lists(st.floats(width=32), min_size=1, max_size=30),
    st.sampled_from(FLOATS),
    st.sampled_from(FLOATS),
)
def test_conversions_are_judged_as_torch_does_them(
    tmp_path: Path, values: list[float], old: torch.dtype, new: torch.dtype
) -> None:
    base = torch.tensor(values).to(old)
    out = base.to(new)
    overflows = bool((out.isinf() & base.isfinite()).any())

    findings = compare(tmp_path, out, base)

    if old is not new:
        assert [f.check for f in findings] == ["converted"] * overflows
    if overflows or old is new or (new is torch.float32 and old is torch.float32):
        return
    moved = (out.view(torch.int16 if out.element_size() == 2 else torch.int32) ^ 1).view(new)
    if not bool((moved.isnan() & base.isnan()).all()):
        assert [f.check for f in compare(tmp_path, moved, base)] == ["converted"]

"""The numeric comparison: never a false alarm, and nothing wrong by more than a rounding passes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_verify_sample import NAMES, write_weights

from merge_core.verify import FileCheck, Finding, check_file, file_check
from merge_core.verify.against_base import Comparison
from merge_core.verify.header import read_header
from merge_core.verify.merged import MergedTensor
from merge_core.verify.recipe import Delta
from merge_core.verify.rounding import from_float32, half_ulp, stored, to_float32
from merge_core.verify.weights import BaseTensor

FLOATS = [torch.bfloat16, torch.float16, torch.float32]
Term = tuple[torch.Tensor, torch.Tensor, float]

# Each example overwrites the files of the one before.
SAME_TMP_PATH = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def compare(
    directory: Path, out: torch.Tensor, base: torch.Tensor, terms: Sequence[Term] = ()
) -> list[Finding]:
    """Findings about ``out`` as the sum of ``base`` and the terms (A, B, scale)."""
    files = [directory / name for name in ("out.safetensors", "base.safetensors", "lora")]
    write_weights(files[0], {"w": out})
    # The tensor before it moves the base's data off the page.
    write_weights(files[1], {"pad": torch.zeros(3, dtype=torch.bfloat16), "w": base})
    write_weights(
        files[2],
        {
            f"{n}{name}": t
            for n, term in enumerate(terms)
            for name, t in zip("AB", term, strict=False)
        },
    )
    deltas = tuple(
        Delta(path=str(files[2]), a=f"{n}A", b=f"{n}B", scale=term[2], transposed=False)
        for n, term in enumerate(terms)
    )
    source = BaseTensor(path=str(files[1]), entry=read_header(files[1])[1])
    check = FileCheck(
        path=str(files[0]),
        level="numeric",
        rows=None,
        comparisons=(Comparison(tensor="w", base=source, deltas=deltas),),
    )
    return list(check_file(check).findings)


def plain_sum(base: torch.Tensor, terms: Sequence[Term]) -> torch.Tensor:
    """As PEFT does it."""
    total = sum(((b.float() @ a.float()) * s for a, b, s in terms), torch.zeros(()))
    return base.float() + total


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


def sample(rows: int, cols: int, dtype: torch.dtype) -> tuple[torch.Tensor, list[Term]]:
    torch.manual_seed(rows)
    base = (torch.randn(rows, cols) * 0.02).to(dtype)
    return base, [(torch.randn(8, cols) * 0.1, torch.randn(rows, 8) * 0.1, 0.5)]


def next_value(tensor: torch.Tensor, row: int, column: int, steps: int = 1) -> torch.Tensor:
    moved = tensor.clone()
    bits = moved.view(torch.int16 if tensor.element_size() == 2 else torch.int32)
    bits[row, column] += steps
    return moved


@pytest.mark.parametrize("place", [(0, 0), (17, 3), (299, 69)])
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_value_that_is_two_units_off_is_found(
    dtype: torch.dtype, place: tuple[int, int], tmp_path: Path
) -> None:
    base, terms = sample(300, 70, dtype)
    # In float32 the bound of the arithmetic itself is some units wide.
    steps = 64 if dtype is torch.float32 else 2
    out = next_value(plain_sum(base, terms).to(dtype), *place, steps)

    [finding] = compare(tmp_path, out, base, terms)

    assert (finding.check, finding.where) == ("merged", f"out.safetensors: w, row {place[0]}")
    value = float(out[place])
    assert finding.what.startswith(
        f"1 of 21000 values are wrong; the first is {value:.9g} in column {place[1]}, where"
    )


def test_one_unit_off_is_found_unless_it_was_a_tie(tmp_path: Path) -> None:
    base, terms = sample(64, 64, torch.bfloat16)
    exact = plain_sum(base.double(), [(a.double(), b.double(), s) for a, b, s in terms])
    out = exact.to(torch.bfloat16)
    nearer_zero = (out.view(torch.int16) - 1).view(torch.bfloat16)

    [finding] = compare(tmp_path, nearer_zero, base, terms)

    # One step off is wrong unless the exact value lies (nearly) in the middle of the two.
    count = int(finding.what.split()[0])
    assert 64 * 64 - 20 < count <= 64 * 64


def test_every_wrong_value_is_counted_across_blocks_and_tiles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_check, "NUMERIC_BLOCK_BYTES", 8192)  # some three rows each
    base, terms = sample(301, 1300, torch.bfloat16)
    out = plain_sum(base, terms).to(torch.bfloat16)
    for row, column in [(7, 1299), (7, 3), (8, 256), (150, 0), (300, 1299)]:
        out = next_value(out, row, column, 2)

    [finding] = compare(tmp_path, out, base, terms)

    assert finding.where == "out.safetensors: w, row 7"
    assert finding.what.startswith(f"5 of {301 * 1300} values are wrong; the first is ")
    assert " in column 3, where" in finding.what


def test_a_row_longer_than_a_block_is_read_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_check, "NUMERIC_BLOCK_BYTES", 1024)
    base, terms = sample(3, 9000, torch.float32)
    out = plain_sum(base, terms)
    out[1, 8999] = 1

    assert compare(tmp_path, plain_sum(base, terms), base, terms) == []
    [finding] = compare(tmp_path, out, base, terms)
    assert (finding.check, finding.where) == ("merged", "out.safetensors: w, row 1")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", FLOATS)
def test_values_that_are_not_finite_are_found(
    dtype: torch.dtype, value: float, tmp_path: Path
) -> None:
    base, terms = sample(40, 30, dtype)
    out = plain_sum(base, terms).to(dtype)
    out[31, 7] = value

    [finding] = compare(tmp_path, out, base, terms)

    assert (finding.check, finding.where) == ("finite", "out.safetensors: w, row 31")
    assert finding.what.startswith(f"1 of 1200 values are wrong; the first is {value} in column 7")


def test_a_merge_into_infinity_cannot_pass_as_right(tmp_path: Path) -> None:
    """The base is infinite too, so output and expectation agree."""
    base, terms = sample(40, 30, torch.bfloat16)
    base[3, 3] = float("inf")

    findings = compare(tmp_path, plain_sum(base, terms).to(torch.bfloat16), base, terms)

    assert [(f.check, f.where) for f in findings] == [("finite", "out.safetensors: w, row 3")]


def test_a_value_lost_to_zero_is_found(tmp_path: Path) -> None:
    base, terms = sample(40, 30, torch.bfloat16)
    out = plain_sum(base, terms).to(torch.bfloat16)
    out[9, 9] = 0
    # Small enough to be lost in half a unit of any ordinary value.
    small = [(a, b * 1e-6, s) for a, b, s in terms]

    assert [f.where for f in compare(tmp_path, out, base, terms)] == ["out.safetensors: w, row 9"]
    out = plain_sum(base * 0, small).to(torch.bfloat16)
    assert compare(tmp_path, out, base * 0, small) == []
    out[5, 5] = 0
    assert [f.where for f in compare(tmp_path, out, base * 0, small)] == [
        "out.safetensors: w, row 5"
    ]


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 3e38])
def test_factors_that_are_not_finite_pass_nothing(poison: float, tmp_path: Path) -> None:
    base, terms = sample(40, 30, torch.bfloat16)
    out = plain_sum(base, terms).to(torch.bfloat16)
    a, b, _ = terms[0]
    b[6, 2] = poison

    findings = compare(tmp_path, out, base, [(a, b, 100.0)])

    assert [f.check for f in findings] == ["merged"]
    assert findings[0].where == "out.safetensors: w, row 0"


def test_rounding_twice_is_found(tmp_path: Path) -> None:
    """What PEFT's safe_merge does: the delta is rounded before it is added."""
    base, terms = sample(64, 64, torch.bfloat16)
    out = base + plain_sum(torch.zeros(64, 64), terms).to(torch.bfloat16)

    [finding] = compare(tmp_path, out, base, terms)

    assert finding.check == "merged"
    assert int(finding.what.split()[0]) > 100


@pytest.mark.parametrize("byte", [0, 4095, 4096, 8999])
def test_a_copy_with_one_wrong_byte_is_found(
    byte: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_check, "NUMERIC_BLOCK_BYTES", 1000)
    base = torch.randn(45, 100, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    out = base.clone()
    out.view(torch.uint8).view(-1)[byte] ^= 1

    assert compare(tmp_path, base, base) == []
    [finding] = compare(tmp_path, out, base)
    assert (finding.check, finding.where) == ("copied", f"out.safetensors: w, row {byte // 200}")
    assert finding.what.startswith(f"byte {byte} is not the base's")


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


def test_a_conversion_that_cuts_off_instead_of_rounding_is_found(tmp_path: Path) -> None:
    base = torch.tensor([[1.0, 2.0], [1.0 + 2**-8 + 2**-9, 3.0]])
    cut = (base.view(torch.int32) >> 16).to(torch.int16).view(torch.bfloat16)

    [finding] = compare(tmp_path, cut, base)

    assert (finding.check, finding.where) == ("converted", "out.safetensors: w, row 1")
    assert finding.what == "value 2 is not the base's F32 value rounded to BF16"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_ulp_is_half_the_way_to_the_next_value(dtype: torch.dtype) -> None:
    every = torch.arange(0, 2**15, dtype=torch.int16).view(dtype)
    finite = every[every.isfinite()].double().numpy()

    expected = np.diff(finite) / 2  # the last finite value has no next one

    assert np.array_equal(half_ulp(finite[:-1], NAMES[dtype]), expected)
    assert np.array_equal(half_ulp(-finite[:-1], NAMES[dtype]), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_value_survives_decoding_and_rounding(dtype: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    elements = stored(every.view(torch.uint8).numpy(), NAMES[dtype])

    decoded = to_float32(elements, NAMES[dtype])

    assert np.array_equal(decoded, every.float().numpy(), equal_nan=True)
    numbers = ~np.isnan(decoded)
    back = from_float32(decoded, NAMES[dtype])
    assert np.array_equal(back.view(np.uint16)[numbers], elements.view(np.uint16)[numbers])
    assert np.isnan(to_float32(back, NAMES[dtype])[~numbers]).all()


@pytest.mark.parametrize("row", [0, 299])
def test_some_rows_are_judged_whatever_the_first_pass_says(
    row: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        MergedTensor, "_surely_right", lambda _, got, *__: np.ones(len(got), np.bool_)
    )
    base, terms = sample(300, 70, torch.bfloat16)
    out = next_value(plain_sum(base, terms).to(torch.bfloat16), row, 5, 2)

    [finding] = compare(tmp_path, out, base, terms)

    assert finding.where == f"out.safetensors: w, row {row}"

"""The numeric comparison finds every value that is wrong by more than a rounding."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from merged_by_hand import FLOATS, compare
from oracles import Term, plain_sum

from merge_core.verify import file_check
from merge_core.verify.merged import MergedTensor


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


def test_a_conversion_that_cuts_off_instead_of_rounding_is_found(tmp_path: Path) -> None:
    base = torch.tensor([[1.0, 2.0], [1.0 + 2**-8 + 2**-9, 3.0]])
    cut = (base.view(torch.int32) >> 16).to(torch.int16).view(torch.bfloat16)

    [finding] = compare(tmp_path, cut, base)

    assert (finding.check, finding.where) == ("converted", "out.safetensors: w, row 1")
    assert finding.what == "value 2 is not the base's F32 value rounded to BF16"


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

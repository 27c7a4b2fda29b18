"""``verify`` names every defect that is planted in the tensors of a finished merge."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from merged_by_hand import (
    FIRST,
    GATE,
    NORM,
    Q0,
    Q1,
    SECOND,
    found,
    merged_names,
    read_rows,
    write_ledger,
    write_out,
)
from models import make_adapter, make_base, read_tensors
from oracles import Tensors


@pytest.fixture
def rewritten(
    base: Path, adapter: Path, wanted: Tensors, tmp_path: Path
) -> Callable[[Tensors], Path]:
    """A finished merge with some tensors changed, and a ledger that knows no better."""

    def rewrite(changes: Tensors) -> Path:
        tensors = {**wanted, **changes}
        actions = merged_names(adapter)
        return write_out(tmp_path / "out", tensors, actions, base=base, adapters={adapter: 1.0})

    return rewrite


def shifted_row(right: Tensors) -> Tensors:
    changed = right[GATE].clone()
    changed[11] = changed[11].roll(1)
    return {GATE: changed}


def shifted_rows(right: Tensors) -> Tensors:
    return {GATE: right[GATE].roll(1, 0)}


def flipped_bit(bit: int) -> Callable[[Tensors], Tensors]:
    def plant(right: Tensors) -> Tensors:
        changed = right[GATE].clone()
        changed.view(torch.int16)[40, 7] ^= 1 << bit
        return {GATE: changed}

    return plant


def one_value(name: str, row: int, value: float) -> Callable[[Tensors], Tensors]:
    def plant(right: Tensors) -> Tensors:
        changed = right[name].clone()
        changed[row] = value
        return {name: changed}

    return plant


DEFECTS: dict[str, tuple[Callable[[Tensors], Tensors], list[tuple[str, str]]]] = {
    "a row shifted by one": (shifted_row, [("merged", f"{FIRST}: {GATE}, row 11")]),
    "all rows shifted by one": (shifted_rows, [("merged", f"{FIRST}: {GATE}, row 0")]),
    "two merged tensors swapped": (
        lambda right: {Q0: right[Q1], Q1: right[Q0]},
        [("merged", f"{FIRST}: {Q0}, row 0"), ("merged", f"{SECOND}: {Q1}, row 0")],
    ),
    "two copied tensors swapped": (
        lambda right: {
            f"model.layers.{n}.self_attn.k_proj.bias": right[
                f"model.layers.{1 - n}.self_attn.k_proj.bias"
            ]
            for n in (0, 1)
        },
        [
            ("copied", f"{file}: model.layers.{n}.self_attn.k_proj.bias, row 0")
            for n, file in enumerate((FIRST, SECOND))
        ],
    ),
    **{
        f"bit {bit} flipped": (flipped_bit(bit), [("merged", f"{FIRST}: {GATE}, row 40")])
        for bit in range(1, 16)
    },
    "NaN": (one_value(GATE, 3, float("nan")), [("finite", f"{FIRST}: {GATE}, row 3")]),
    "infinity": (one_value(Q1, 9, float("-inf")), [("finite", f"{SECOND}: {Q1}, row 9")]),
    "a copied value changed": (one_value(NORM, 60, 2.0), [("copied", f"{FIRST}: {NORM}, row 60")]),
    "another shape": (
        lambda right: {GATE: right[GATE][:-1]},
        [("base", f"{FIRST}: {GATE}")],
    ),
    "a tensor too many": (
        lambda _: {"model.extra": torch.ones(2)},
        [("base", f"{FIRST}: model.extra")],
    ),
}


@pytest.mark.parametrize("story", DEFECTS)
def test_numeric_alone_names_the_defect(
    story: str, wanted: Tensors, rewritten: Callable[[Tensors], Path]
) -> None:
    plant, expected = DEFECTS[story]
    out = rewritten(plant(wanted))

    assert found(out, "digest") == []  # the ledger was written from the damaged tensors
    assert found(out, "numeric") == expected


def test_a_delta_left_out_or_doubled_is_found(
    base: Path, adapter: Path, rewritten: Callable[[Tensors], Path]
) -> None:
    untouched = read_tensors(base)
    names = sorted(merged_names(adapter))
    out = rewritten({name: untouched[name] for name in names})

    checks = found(out, "numeric")

    assert {check for check, _ in checks} == {"merged"}
    assert sorted(where.split(": ")[1].split(",")[0] for _, where in checks) == names


def test_a_tensor_left_out_is_found(
    base: Path, adapter: Path, wanted: Tensors, tmp_path: Path
) -> None:
    tensors = {name: tensor for name, tensor in wanted.items() if name != NORM}
    out = write_out(
        tmp_path / "out", tensors, merged_names(adapter), base=base, adapters={adapter: 1.0}
    )

    assert found(out, "numeric") == [("base", NORM)]
    assert found(out, "load") == [("load", NORM)]


def test_an_adapter_that_fits_nothing_is_found(finished: Path, base: Path, tmp_path: Path) -> None:
    other = make_base(tmp_path / "deep", num_hidden_layers=3)
    adapter = make_adapter(tmp_path / "other", other, target_modules=["q_proj"])

    checks = found(finished, "numeric", adapters=[(adapter, 1.0)])

    assert ("adapter", f"{adapter}: model.layers.2.self_attn.q_proj") in checks


def test_a_ledger_that_calls_a_merge_a_copy_is_found(finished: Path) -> None:
    rows = read_rows(finished)
    for row in rows:
        if row["tensor"] in (GATE, NORM):
            row["action"] = "converted"
    write_ledger(finished, rows)

    assert found(finished, "digest") == []
    assert sorted(found(finished, "numeric")) == [
        ("ledger", f"{FIRST}: {NORM}"),
        ("ledger", f"{FIRST}: {GATE}"),
    ]


@pytest.mark.parametrize("place", [0, 4096, -1])
def test_a_flipped_bit_anywhere_in_the_data_is_found_by_digest(place: int, finished: Path) -> None:
    path = finished / SECOND
    blob = bytearray(path.read_bytes())
    blob[place if place < 0 else 4096 + place] ^= 0x10
    path.write_bytes(blob)

    [(check, where)] = found(finished, "digest")

    assert check == "digest"
    assert where.startswith(f"{SECOND}: ")
    assert found(finished, "structure") == []

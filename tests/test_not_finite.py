"""A result that is infinite or no number ends the merge, with tensor and row."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from handmade import (
    FACTORS,
    FOUR_LANES,
    GEOMETRY,
    assert_no_checkpoint,
    random_tensors,
    small_merge,
)

from merge_core.errors import NonFiniteError
from merge_core.merge import merge

GATE = "model.layers.1.mlp.gate_proj"


def spoiled_base(value: float) -> dict[str, torch.Tensor]:
    tensors = random_tensors(GEOMETRY)
    tensors[f"{GATE}.weight"][7, 3] = value
    return tensors


def overflowing() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    a, b = (factor.clone() for factor in FACTORS[GATE])
    a[:, 3], b[7] = 100.0, 100.0  # 4 * 100 * 100 * 2 > 65504, in one place alone
    return {**FACTORS, GATE: (a, b)}


@pytest.mark.parametrize(
    ("tensors", "factors", "said"),
    [
        (spoiled_base(math.inf), FACTORS, "row 7, column 3 is inf"),
        (spoiled_base(math.nan), FACTORS, "row 7, column 3 is nan"),
        (random_tensors(GEOMETRY, torch.float16), overflowing(), "row 7, column 3 is inf"),
    ],
    ids=["inf in the base", "NaN in the base", "float16 overflow"],
)
def test_a_result_that_is_no_number_names_tensor_and_row_and_publishes_nothing(
    tmp_path: Path, out: Path, tensors: Any, factors: Any, said: str
) -> None:
    plan = small_merge(tmp_path, tensors, factors)

    with pytest.raises(NonFiniteError) as caught:
        merge(plan, out, choice=FOUR_LANES)

    assert (caught.value.where, caught.value.what) == (f"tensor {GATE}.weight", said)
    assert caught.value.exit_code == 1
    assert_no_checkpoint(out)

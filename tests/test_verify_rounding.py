"""The 16-bit formats of the numeric comparison: decoding, rounding and half a unit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from merged_by_hand import NAMES

from merge_core.verify.rounding import from_float32, half_ulp, stored, to_float32


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

"""A merge follows none of torch's global settings, and leaves them as they were."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from handmade import FOUR_LANES, published

from merge_core.merge import merge
from merge_core.plan import MergePlan


def test_a_merge_leaves_torchs_threads_and_precision_as_they_were(
    small: MergePlan, out: Path
) -> None:
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    torch.set_num_threads(3)
    torch.set_float32_matmul_precision("high")
    try:
        merge(small, out, choice=FOUR_LANES)
        after = torch.get_num_threads(), torch.get_float32_matmul_precision()
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)

    assert after == (3, "high")


def test_products_are_exact_whatever_precision_the_caller_asked_torch_for(
    small: MergePlan, tmp_path: Path, out: Path
) -> None:
    merge(small, tmp_path / "calm", choice=FOUR_LANES)
    backends: Any = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend, precision in zip(backends, ("tf32", "bf16"), strict=True):
            backend.fp32_precision = precision
        merge(small, out, choice=FOUR_LANES)
        after = [backend.fp32_precision for backend in backends]
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision

    assert after == ["tf32", "bf16"]
    assert published(out) == published(tmp_path / "calm")

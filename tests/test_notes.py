"""What a plan says of things that are odd, though nothing is wrong with them."""

from __future__ import annotations

from pathlib import Path

import pytest
from handmade import Geometry, random_factors, random_tensors, write_adapter, write_base

from merge_core.planner import make_plan

SMALL = Geometry(layers=1)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_base(tmp_path / "base", random_tensors(SMALL), SMALL.config)


def adapter_with(path: Path, **fields: object) -> Path:
    factors = random_factors(SMALL.linear, dict.fromkeys(SMALL.linear, 4))
    return write_adapter(path, factors, r=4, lora_alpha=8, **fields)


def test_patterns_that_match_no_module_are_named(base: Path, tmp_path: Path) -> None:
    adapter = adapter_with(
        tmp_path / "adapter",
        rank_pattern={"q_porj": 8},
        alpha_pattern={"mlp.down_proj": 16, "layers.7.mlp.up_proj": 16},
    )

    assert make_plan(base, [adapter]).notes == (
        f"{adapter}: rank_pattern 'q_porj' matches no module",
        f"{adapter}: alpha_pattern 'layers.7.mlp.up_proj' matches no module",
    )


def test_an_adapter_that_is_given_twice_is_named_once(base: Path, tmp_path: Path) -> None:
    adapter = adapter_with(tmp_path / "adapter", alpha_pattern={"nowhere": 1})

    assert make_plan(base, [adapter, f"{adapter}@0.5"]).notes == (
        f"{adapter} is given 2 times, and added 2 times",
        f"{adapter}: alpha_pattern 'nowhere' matches no module",
    )

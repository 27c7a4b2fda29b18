"""Other tuners than LoRA give what PEFT makes of a float32 copy of the base, rounded once."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from models import DTYPES, assert_same_tensors, oracle, read_tensors
from tuners import ALL, CONFIGS, make_tuned, merged_by_peft

from merge_core.merge import merge
from merge_core.planner import make_plan

ROUNDS_ONCE = {
    "ADALORA",
    "BEFT",
    "BOFT",
    "FOURIERFT",
    "GRALORA",
    "HRA",
    "IA3",
    "LN_TUNING",
    "LOHA",
    "LOKR",
    "MISS",
    "OFT",
    "PVERA",
    "SHIRA",
    "TINYLORA",
    "VBLORA",
    "VERA",
    "WAVEFT",
}
"""Where PEFT, in the dtype of a 16-bit base, comes to the same bits."""


@pytest.fixture(autouse=True)
def _one_thread_and_no_warnings() -> Iterator[None]:
    """The last bits of products this small depend on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, about what it leaves out of the file
        yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", ALL)
def test_the_result_is_that_of_peft_on_a_float32_copy_rounded_once(
    name: str, bases: Callable[..., Path], tmp_path: Path
) -> None:
    for dtype in ("F32", "BF16") if name in CONFIGS else ("BF16",):
        base = bases(dtype, shard="80KB")
        adapter = make_tuned(tmp_path / f"adapter{dtype}", base, name)

        merge(make_plan(base, [adapter], shard_bytes=70_000), tmp_path / dtype)

        wanted = merged_by_peft(base, adapter)
        wanted = {name: tensor.to(DTYPES[dtype]) for name, tensor in wanted.items()}
        assert_same_tensors(read_tensors(tmp_path / dtype), wanted)
        assert any(not torch.equal(wanted[n], t) for n, t in read_tensors(base).items())


@pytest.mark.parametrize("name", CONFIGS)
def test_where_peft_rounds_once_it_comes_to_the_same_bits_in_16_bits(
    name: str, base: Path, tmp_path: Path
) -> None:
    adapter = make_tuned(tmp_path / "adapter", base, name)

    rounded = {n: tensor.bfloat16() for n, tensor in merged_by_peft(base, adapter).items()}
    same = all(torch.equal(rounded[n], t) for n, t in oracle(base, adapter).items())

    assert same == (name in ROUNDS_ONCE)

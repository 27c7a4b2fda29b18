"""Any tiny checkpoint with any adapter of the supported kind merges as it should."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from handmade import (
    TWO_LANES,
    Geometry,
    deltas_of,
    keyed,
    random_factors,
    random_tensors,
    write_adapter,
    write_base,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from models import DTYPES, assert_same_tensors, oracle, read_tensors
from oracles import Delta, Tensors, assert_within_contract, merged_like_peft
from peft.utils.other import get_pattern_key

from merge_core.merge import merge
from merge_core.planner import make_plan
from merge_core.verify import verify

PATTERNS = [
    "q_proj",
    "self_attn.k_proj",
    ".*_proj",
    "layers.1.mlp.up_proj",
    "^model.layers.0.*",
    "(q|v)_proj",
    r"model\.layers\.\d+\.mlp\.down_proj",
    "no_such_module",
    "proj",
]
Factors = dict[str, tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """An adapter: what is written, and what it must add."""

    factors: Factors
    config: dict[str, Any]
    weight: float
    pickled: bool
    deltas: dict[str, list[Delta]]

    def write(self, path: Path) -> str:
        write_adapter(path, self.factors, **self.config)
        if self.pickled:
            (path / "adapter_model.safetensors").unlink()
            torch.save(keyed(self.factors), path / "adapter_model.bin")
        return str(path) if self.weight == 1 else f"{path}@{self.weight}"

    @property
    def is_plain(self) -> bool:
        """Whether PEFT's own arithmetic can say what the result must be, to the bit."""
        return self.weight == 1 and all(a.dtype == torch.float32 for a, _ in self.factors.values())


@st.composite
def geometries(draw: st.DrawFn) -> Geometry:
    heads = draw(st.sampled_from([1, 2, 4]))
    return Geometry(
        hidden=heads * draw(st.sampled_from([4, 6, 16])),
        inner=draw(st.integers(3, 90)),
        heads=heads,
        kv_heads=draw(st.sampled_from([n for n in (1, 2, 4) if heads % n == 0])),
        layers=draw(st.integers(1, 3)),
        vocab=draw(st.integers(3, 70)),
        tied=draw(st.booleans()),
    )


@st.composite
def adapters(draw: st.DrawFn, geometry: Geometry, *, plain: bool = False) -> Drawn:
    shapes = dict(geometry.linear)
    if not geometry.tied:
        shapes["lm_head"] = (geometry.vocab, geometry.hidden)
    targets = draw(st.lists(st.sampled_from(sorted(shapes)), min_size=1, unique=True))
    rank, alpha = draw(st.integers(1, 9)), draw(st.integers(1, 40) | st.just(2.7))
    ranks = draw(st.dictionaries(st.sampled_from(PATTERNS), st.integers(1, 7), max_size=3))
    alphas = draw(st.dictionaries(st.sampled_from(PATTERNS), st.integers(1, 40), max_size=3))
    stabilised = draw(st.booleans())
    dtype = torch.float32 if plain else DTYPES[draw(st.sampled_from(["F32", "F32", "BF16", "F16"]))]
    weight = 1 if plain else draw(st.sampled_from([1, 1, 0.5, -1, 1.3]))
    of_rank = {m: ranks.get(get_pattern_key(ranks, m), rank) for m in targets}
    of_alpha = {m: alphas.get(get_pattern_key(alphas, m), alpha) for m in targets}
    factors = random_factors(shapes, of_rank, dtype, seed=draw(st.integers(0, 99)))
    deltas = {}
    for module, pair in factors.items():
        divisor = math.sqrt(of_rank[module]) if stabilised else of_rank[module]
        deltas |= deltas_of({module: pair}, of_alpha[module] / divisor * weight)
    config = {
        "r": rank,
        "lora_alpha": alpha,
        "use_rslora": stabilised,
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "target_modules": sorted(targets),
    }
    pickled = draw(st.booleans())
    return Drawn(factors=factors, config=config, weight=weight, pickled=pickled, deltas=deltas)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The oracle multiplies as a lane does: MKL's last bit of a product of five to eleven rows
    depends on the number of threads (no real layer is that narrow)."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def put(folder: Path, tensors: Tensors, geometry: Geometry, files: int) -> Path:
    return write_base(folder / "base", tensors, {**geometry.config, "dtype": "float32"}, files)


@given(st.data())
@settings(max_examples=45)
def test_any_adapters_merge_into_any_checkpoint(
    folders: Iterator[Path], data: st.DataObject
) -> None:
    folder, geometry = next(folders), data.draw(geometries())
    dtype = DTYPES[data.draw(st.sampled_from(sorted(DTYPES)))]
    into = data.draw(st.sampled_from([None, None, "bfloat16", "float16", "float32"]))
    drawn = data.draw(st.lists(adapters(geometry), min_size=1, max_size=2))
    tensors = random_tensors(geometry, dtype, seed=data.draw(st.integers(0, 99)))
    base = put(folder, tensors, geometry, data.draw(st.integers(1, 3)))
    named = [adapter.write(folder / f"adapter-{n}") for n, adapter in enumerate(drawn)]
    limit = data.draw(st.sampled_from([1, 3000, 20_000, 10**9]))

    out = folder / "out"
    merge(make_plan(base, named, dtype=into, shard_bytes=limit), out, choice=TWO_LANES)

    got = read_tensors(out)
    if into is None and len(drawn) == 1 and drawn[0].is_plain:
        assert_same_tensors(got, merged_like_peft(tensors, drawn[0].deltas))
    else:
        deltas: dict[str, list[Delta]] = {}
        for adapter in drawn:
            for name, (delta,) in adapter.deltas.items():
                deltas.setdefault(name, []).append(delta)
        # Some of these deltas are larger than the base, which shows more of float32's noise.
        target = getattr(torch, into) if into else None
        assert_within_contract(got, tensors, deltas, target, slack=10)
    report = verify(out, "numeric")
    assert report.ok, report.findings


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match:RuntimeWarning")
@given(st.data())
@settings(max_examples=8)
def test_these_adapters_mean_the_same_to_peft(folders: Iterator[Path], data: st.DataObject) -> None:
    folder, geometry = next(folders), data.draw(geometries())
    adapter = data.draw(adapters(geometry, plain=True))
    tensors = random_tensors(geometry, torch.float32)
    base = put(folder, tensors, geometry, 1)
    adapter.write(folder / "adapter")

    assert_same_tensors(oracle(base, folder / "adapter"), merged_like_peft(tensors, adapter.deltas))

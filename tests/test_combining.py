"""Adapters are combined as PEFT's ``add_weighted_adapter`` does it, and then merged."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
from models import assert_same_tensors, deltas_of_adapter, make_adapter, read_tensors
from oracles import assert_within_contract
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils import merge_utils
from transformers import AutoModelForCausalLM
from tuners import make_tuned

from merge_core import combining
from merge_core.errors import InputError
from merge_core.merge import merge
from merge_core.planner import make_plan
from merge_core.updates import LowRankUpdate, SingleUpdate
from merge_core.updates.arithmetic import random_mask
from merge_core.updates.combined import Combination
from merge_core.verify import verify

WEIGHTS = (0.7, -1.3)
BIT_BY_BIT = {
    "linear": {},
    "cat": {},
    "ties": {"density": 0.3},
    "ties by frequency": {"density": 0.55, "majority_sign": "frequency"},
    "dare_linear": {"density": 0.4, "seed": 7},
    "dare_ties": {"density": 0.8},
    "dare_ties by frequency": {"density": 0.5, "majority_sign": "frequency", "seed": 1},
    "magnitude_prune": {"density": 0.25},
}
CLOSE = {
    "svd": {},
    "ties_svd": {"density": 0.3},
    "dare_linear_svd": {"density": 0.4, "seed": 3},
    "dare_ties_svd": {"density": 0.6, "majority_sign": "frequency"},
    "magnitude_prune_svd": {"density": 0.25},
}
FEW = ["q_proj", "down_proj"]


def combination(case: str, options: dict[str, Any]) -> Combination:
    method: Any = case.partition(" ")[0]
    return Combination(method=method, **options)


def adapters_for(tmp_path: Path, base: Path, second: dict[str, Any]) -> list[Path]:
    """Of other scalings, and where they may be, of other ranks and targets."""
    one = make_adapter(tmp_path / "one", base, seed=1, lora_alpha=12, target_modules=FEW)
    two = make_adapter(tmp_path / "two", base, **{"seed": 2, "target_modules": FEW, **second})
    return [one, two]


def combined_by_peft(
    base: Path,
    adapters: list[Path],
    how: Combination,
    monkeypatch: pytest.MonkeyPatch,
    weights: tuple[float, ...] = WEIGHTS,
) -> dict[str, torch.Tensor]:
    """PEFT's result where it drops what raymeld drops."""
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapters[0], "0")
    for number, path in enumerate(adapters[1:], start=1):
        peft.load_adapter(path, str(number))
    keys = iter(list(_keys(peft, how, len(adapters))))

    def random_pruning(tensor: torch.Tensor, density: float, rescale: bool) -> torch.Tensor:
        assert rescale
        return tensor * random_mask(tensor.shape, density, next(keys)).float() / density

    monkeypatch.setattr(merge_utils, "random_pruning", random_pruning)
    peft.add_weighted_adapter(
        [str(number) for number in range(len(adapters))],
        list(weights),
        "combined",
        combination_type=how.method,
        density=how.density,
        majority_sign_method=how.majority_sign or "total",
    )
    peft.set_adapter("combined")
    merged = peft.merge_and_unload()
    return {name: tensor.detach().clone() for name, tensor in merged.state_dict().items()}


def _keys(peft: PeftModel, how: Combination, adapters: int) -> Iterator[str]:
    """What decides what is dropped, in the order of PEFT's work."""
    for path, module in peft.base_model.model.named_modules():
        if isinstance(module, LoraLayer):
            for what in ["delta"] if how.truncates else "AB":
                for number in [n for n in range(adapters) if str(n) in module.lora_A]:
                    yield f"{how.seed or 0}\n{path}.weight\n{what}\n{number}"


def weighted(adapters: list[Path]) -> list[str]:
    return [f"{path}@{weight}" for path, weight in zip(adapters, WEIGHTS, strict=True)]


@pytest.mark.parametrize(
    ("dtype", "case"),
    [(d, c) for c in BIT_BY_BIT for d in ("BF16", "F32") if (d, c) != ("BF16", "cat")],
)
def test_factors_are_combined_as_peft_combines_them_to_the_bit(
    dtype: str,
    case: str,
    bases: Callable[..., Path],
    tmp_path: Path,
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base, how = bases(dtype, shard="80KB"), combination(case, BIT_BY_BIT[case])
    second = {"r": 3, "target_modules": ["k_proj", "down_proj"]} if case == "cat" else {}
    adapters = adapters_for(tmp_path, base, second)

    merge(make_plan(base, weighted(adapters), combination=how, shard_bytes=70_000), out)

    wanted = combined_by_peft(base, adapters, how, monkeypatch)
    assert_same_tensors(read_tensors(out), wanted)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_cat_is_rounded_once_where_peft_rounds_the_factors_to_the_dtype_of_the_base(
    dtype: str, bases: Callable[..., Path], tmp_path: Path, out: Path
) -> None:
    base = bases(dtype, shard="80KB")
    fields = {"scale": 0.02, "r": 3, "target_modules": ["k_proj", "down_proj"]}
    adapters = [
        make_adapter(tmp_path / "one", base, seed=1, scale=0.02, target_modules=FEW),
        make_adapter(tmp_path / "two", base, seed=2, **fields),
    ]

    merge(make_plan(base, weighted(adapters), combination=Combination(method="cat")), out)

    deltas = deltas_of_adapter(*adapters, weights=WEIGHTS)
    assert_within_contract(read_tensors(out), read_tensors(base), deltas)
    assert verify(out, "numeric").findings == ()


@pytest.mark.parametrize("case", CLOSE)
def test_deltas_are_cut_to_the_largest_rank_as_peft_cuts_them(
    case: str,
    bases: Callable[..., Path],
    tmp_path: Path,
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base, how = bases("F32", shard="80KB"), combination(case, CLOSE[case])
    adapters = adapters_for(tmp_path, base, {"r": 5, "target_modules": ["k_proj", "down_proj"]})

    merge(make_plan(base, weighted(adapters), combination=how), out)

    wanted, got = combined_by_peft(base, adapters, how, monkeypatch), read_tensors(out)
    before = read_tensors(base)
    for name, tensor in wanted.items():
        assert torch.allclose(got[name], tensor, rtol=1e-4, atol=2e-6), name
    changed = {name for name in got if not torch.equal(got[name], before[name])}
    assert {name.split(".")[-2] for name in changed} == {"q_proj", "k_proj", "down_proj"}


def test_linear_factors_of_embeddings_are_combined_too(
    bases: Callable[..., Path], tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, how = bases("F32", shard="80KB"), Combination(method="ties", density=0.5)
    fields = {"target_modules": ["embed_tokens", "q_proj"]}
    adapters = [make_adapter(tmp_path / str(n), base, seed=n, **fields) for n in (1, 2)]

    merge(make_plan(base, weighted(adapters), combination=how), out)

    wanted, got = combined_by_peft(base, adapters, how, monkeypatch), read_tensors(out)
    for name, tensor in wanted.items():
        assert torch.allclose(got[name], tensor, rtol=1e-6, atol=1e-7), name


def test_a_combination_of_rank_stabilised_adapters_has_no_scaling_of_its_own(
    bases: Callable[..., Path], tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PEFT 0.21 multiplies it by the square root of its rank."""
    base, how = bases("F32", shard="80KB"), Combination(method="cat")
    fields = {"use_rslora": True, "target_modules": FEW}
    adapters = [make_adapter(tmp_path / str(n), base, seed=n, r=2, **fields) for n in (1, 2)]

    merge(make_plan(base, weighted(adapters), combination=how), out)

    deltas, before = deltas_of_adapter(*adapters, weights=WEIGHTS), read_tensors(base)
    assert_within_contract(read_tensors(out), before, deltas)
    peft = combined_by_peft(base, adapters, how, monkeypatch)
    name = "model.layers.0.self_attn.q_proj.weight"
    twice = before[name] + 2 * (read_tensors(out)[name] - before[name])
    assert torch.allclose(peft[name], twice, rtol=1e-4, atol=1e-5)


def test_what_is_dropped_depends_on_the_seed_alone(base: Path, tmp_path: Path) -> None:
    adapters = adapters_for(tmp_path, base, {})
    merged = []
    for number, (seed, shard_bytes) in enumerate([(1, 70_000), (1, 10**9), (2, 10**9)]):
        how = Combination(method="dare_linear", density=0.5, seed=seed)
        plan = make_plan(base, weighted(adapters), combination=how, shard_bytes=shard_bytes)
        out = tmp_path / f"out{number}"
        merge(plan, out)
        merged.append(read_tensors(out))

    assert_same_tensors(merged[0], merged[1])
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(merged[1][name], merged[2][name])


def test_every_part_of_a_combination_is_in_the_fingerprint(
    base: Path, tmp_path: Path, out: Path
) -> None:
    adapters = adapters_for(tmp_path, base, {})
    how = Combination(method="dare_ties", density=0.5, majority_sign="total", seed=1)
    others = [
        how,
        dataclasses.replace(how, density=0.4),
        dataclasses.replace(how, majority_sign="frequency"),
        dataclasses.replace(how, seed=2),
        dataclasses.replace(how, method="dare_linear", majority_sign=None),
        Combination(),
    ]
    merge(make_plan(base, adapters, combination=how), out)

    for other in others[1:]:
        with pytest.raises(InputError, match="OUT holds a finished merge of plan"):
            merge(make_plan(base, adapters, combination=other), out)
    (note,) = make_plan(base, adapters, combination=how).notes
    assert note == (
        "the factors of 2 adapters are combined by dare_ties, density 0.5, majority sign by total,"
        " seed 1"
    )


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"method": "average"}, "no way to combine called 'average'"),
        ({"method": "ties"}, "ties needs a density"),
        ({"method": "ties", "density": 0.0}, "0 is no share of the elements"),
        ({"method": "ties", "density": 1.5}, "1.5 is no share of the elements"),
        ({"method": "cat", "density": 0.5}, "--density: --combine cat has no use for it"),
        ({"method": "ties", "density": 0.5, "seed": 1}, "--seed: --combine ties has no use for it"),
        ({"majority_sign": "total"}, "--majority-sign: --combine sum has no use for it"),
        ({"method": "dare_ties", "density": 0.5, "majority_sign": "most"}, "'most' elects no sign"),
    ],
)
def test_options_that_do_not_belong_together_are_refused(
    base: Path, how: dict[str, Any], said: str, tmp_path: Path
) -> None:
    adapters = adapters_for(tmp_path, base, {})

    with pytest.raises(InputError) as caught:
        make_plan(base, adapters, combination=Combination(**how))

    assert said in str(caught.value)


def test_one_adapter_has_nothing_to_be_combined_with(base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "one", base)

    with pytest.raises(InputError, match="cat combines several adapters, and there is 1"):
        make_plan(base, [adapter], combination=Combination(method="cat"))


@pytest.mark.parametrize(
    ("second", "said"),
    [
        ({"use_dora": True}, "linear combines low-rank factors alone, and it has DoRA"),
        ({"lora_bias": True, "target_modules": ["q_proj"]}, "and it has lora_bias"),
        ({"trainable_token_indices": [1, 2]}, "and it has trained tokens"),
        ({"modules_to_save": ["lm_head"]}, "and it has whole tensors"),
        ({"bias": "all"}, "and it has whole tensors"),
        ({"r": 4}, r"linear needs factors of one rank, these have \[8, 4\]"),
    ],
)
def test_what_only_a_sum_can_merge_is_refused_and_named(
    base: Path, second: dict[str, Any], said: str, tmp_path: Path
) -> None:
    adapters = adapters_for(tmp_path, base, second)

    with pytest.raises(InputError, match=said):
        make_plan(base, adapters, combination=Combination(method="linear"))


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied")
def test_what_one_adapter_trained_of_both_tied_ends_cannot_be_combined(
    bases: Callable[..., Path], tmp_path: Path
) -> None:
    base = bases("F32", shard="80KB", tie_word_embeddings=True)
    fields = {"target_modules": ["embed_tokens", "lm_head"]}
    adapters = [make_adapter(tmp_path / str(n), base, seed=n, **fields) for n in (1, 2)]
    how = Combination(method="cat")

    with pytest.raises(InputError, match="what one adapter trained of both tied ends"):
        make_plan(base, adapters, combination=how, keep_tied=True)
    assert make_plan(base, adapters, combination=how).added == ("lm_head.weight",)


def test_numeric_names_the_combination_that_it_cannot_check(
    base: Path, tmp_path: Path, out: Path
) -> None:
    adapters = adapters_for(tmp_path, base, {})
    plan = make_plan(base, adapters, combination=Combination(method="linear"))

    with pytest.raises(InputError, match="cannot check adapters combined by linear"):
        merge(plan, out, level="numeric")
    assert not out.exists()
    merge(plan, out)
    with pytest.raises(InputError, match="cannot check adapters combined by linear"):
        verify(out, "numeric")


def test_a_kind_of_update_that_cannot_be_combined_has_a_name() -> None:
    kinds = {
        kind
        for update in get_args(SingleUpdate)
        if update is not LowRankUpdate
        for kind in get_args(get_type_hints(update)["kind"])
    }

    assert kinds | {"whole"} == combining._KINDS.keys()


def test_a_tuner_that_peft_merges_is_not_combined_and_named(base: Path, tmp_path: Path) -> None:
    one = make_adapter(tmp_path / "one", base, target_modules=FEW)
    two = make_tuned(tmp_path / "two", base, "LOHA")

    with pytest.raises(InputError, match="and it has layers that PEFT merges") as caught:
        make_plan(base, [one, two], combination=Combination(method="linear"))

    assert str(two) in caught.value.problems[0].where

"""Experts that were trained as a whole replace those of a checkpoint of either layout."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from merged_by_hand import found
from models import (
    DTYPES,
    Saved,
    assert_same_tensors,
    changed,
    deltas_of_adapter,
    edit_json,
    make_adapter,
    oracle,
    read_tensors,
)
from moe import EXPERTS, HIDDEN, INNER, PREFIX, apart, merged, write_expert_adapter
from oracles import assert_within_contract
from safetensors.torch import load_file, save_file
from test_verify_kinds import plant
from tuners import make_tuned

from cluster.explain import adapter_lines, counts_of
from merge_core.errors import InputError
from merge_core.factors import seal
from merge_core.merge import merge
from merge_core.planner import make_plan
from merge_core.verify import verify

Bases = Callable[..., Path]
LAYOUTS = {"a tensor for each expert": False, "fused": True}
BOTH_LAYOUTS = pytest.mark.parametrize("fused", LAYOUTS.values(), ids=LAYOUTS)
DOWN = f"{PREFIX}model.layers.0.mlp.experts.down_proj"


@pytest.fixture(scope="module")
def adapter(moe: Bases, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not to be changed."""
    return trained(tmp_path_factory.mktemp("whole") / "a", moe())


def trained(path: Path, base: Path, **options: Any) -> Path:
    fields = {"modules_to_save": ["experts"], "target_modules": ["q_proj"], **options}
    return make_adapter(path, base, **fields)


@BOTH_LAYOUTS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["mlp"], "safe": False}], ids=str)
def test_they_are_those_of_the_model_that_peft_loads_to_the_bit(
    options: dict[str, Any], dtype: str, fused: bool, moe: Bases, tmp_path: Path, out: Path
) -> None:
    """One parameter of all experts, or the whole module with the router; safetensors and .bin."""
    base = moe(dtype, fused=fused)
    adapter = trained(tmp_path / "a", base, **options)

    got = merged(base, adapter, out)

    assert_same_tensors(got, apart(oracle(base, adapter)))
    before = apart(read_tensors(base))
    touched = {name for name, tensor in before.items() if not torch.equal(tensor, got[name])}
    assert len([name for name in touched if ".experts." in name]) == 2 * EXPERTS * 3
    assert all(".experts." in name or "q_proj" in name for name in touched) == (not options)


@BOTH_LAYOUTS
def test_the_keys_of_older_files_mean_the_same(
    fused: bool, adapter: Path, moe: Bases, tmp_path: Path, out: Path
) -> None:
    def rename(saved: Saved) -> None:
        for key in [key for key in saved if ".experts." in key]:
            saved[key.replace("experts.", "experts.modules_to_save.default.")] = saved.pop(key)

    older = changed(adapter, tmp_path / "b", rename)

    got = merged(moe(fused=fused), older, out)

    assert_same_tensors(got, apart(oracle(moe(), adapter)))


@BOTH_LAYOUTS
def test_the_factors_of_another_adapter_are_added_to_them_and_rounded_once(
    fused: bool, adapter: Path, moe: Bases, tmp_path: Path, out: Path
) -> None:
    other = write_expert_adapter(tmp_path / "b", moe(), ["up_proj", "down_proj"], lora_alpha=6)

    got = merged(moe(fused=fused), [str(adapter), f"{other}@-0.5"], out)

    replaced = {
        name: tensor
        for name, tensor in apart(oracle(moe(), adapter)).items()
        if ".experts." in name
    }
    deltas = deltas_of_adapter(adapter, other, weights=[1, -0.5])
    assert_within_contract(got, {**read_tensors(moe()), **replaced}, deltas)


@BOTH_LAYOUTS
def test_another_tuner_brings_them_beside_its_layers(
    fused: bool, moe: Bases, tmp_path: Path, out: Path
) -> None:
    """PEFT 0.21 cannot unload them itself: it looks for a weight in the module of experts."""
    base, fields = moe("F32"), {"target_modules": ["q_proj"], "modules_to_save": ["experts"]}
    adapter = make_tuned(tmp_path / "a", base, "LOHA", **fields)
    saved: Saved = {}

    def take_out(held: Saved) -> None:
        for key in [key for key in held if ".experts." in key]:
            saved[key.removeprefix(PREFIX)] = held.pop(key)

    without = changed(adapter, tmp_path / "without", take_out, modules_to_save=None)

    got = merged(moe("F32", fused=fused), adapter, out)

    assert_same_tensors(got, {**apart(oracle(base, without)), **apart(saved)})


@BOTH_LAYOUTS
def test_adapters_that_bring_the_same_are_merged_and_others_refused(
    fused: bool, adapter: Path, moe: Bases, tmp_path: Path, out: Path
) -> None:
    def change(saved: Saved) -> None:
        saved[DOWN][1, 2, 3] += 1

    same = shutil.copytree(adapter, tmp_path / "same")
    other = changed(adapter, tmp_path / "other", change)

    plan = make_plan(moe(fused=fused), [adapter, same])
    merge(plan, out)

    assert len(plan.twins) == 4
    with pytest.raises(InputError, match="should hold the values of") as caught:
        merge(make_plan(moe(fused=fused), [adapter, other]), tmp_path / "2")
    assert DOWN in str(caught.value)


@BOTH_LAYOUTS
def test_a_value_that_is_not_finite_is_named(
    fused: bool, adapter: Path, moe: Bases, tmp_path: Path
) -> None:
    broken = changed(adapter, tmp_path / "b", lambda saved: saved[DOWN][3].fill_(float("nan")))

    with pytest.raises(InputError, match="NaN or infinity in row 3") as caught:
        seal(make_plan(moe(fused=fused), [broken]))

    assert DOWN in str(caught.value)


def lose(saved: Saved) -> None:
    del saved[DOWN]


def grow(saved: Saved) -> None:
    saved[DOWN] = torch.cat([saved[DOWN], saved[DOWN][:, :1]], 1)


def add_expert(saved: Saved) -> None:
    saved[DOWN] = torch.cat([saved[DOWN], saved[DOWN][:1]])


def flatten(saved: Saved) -> None:
    saved[DOWN] = saved[DOWN].flatten(1)


def move(saved: Saved) -> None:
    saved[DOWN.replace("layers.0", "layers.7")] = saved.pop(DOWN)


def rename(saved: Saved) -> None:
    saved[f"{DOWN}x"] = saved.pop(DOWN)


def repeat(saved: Saved) -> None:
    saved[DOWN.replace("experts.", "experts.modules_to_save.")] = saved[DOWN].clone()


CHANGES: dict[str, tuple[Callable[[Saved], None], str]] = {
    "lost": (lose, "for which the file holds nothing"),
    "a row more": (grow, f"[{EXPERTS}, {HIDDEN + 1}, {INNER}]"),
    "an expert more": (add_expert, f"[{EXPERTS + 1}, {HIDDEN}, {INNER}]"),
    "a matrix": (flatten, f"[{EXPERTS}, {HIDDEN * INNER}]"),
    "of another layer": (move, "the base has no model.layers.7.mlp.experts.down_proj"),
    "of another name": (rename, "experts.down_projx' is not known"),
    "twice": (repeat, "are the same tensor"),
}


@BOTH_LAYOUTS
@pytest.mark.parametrize("story", CHANGES)
def test_what_is_lost_or_misshapen_is_named(
    story: str, fused: bool, adapter: Path, moe: Bases, tmp_path: Path
) -> None:
    change, said = CHANGES[story]

    with pytest.raises(InputError) as caught:
        make_plan(moe(fused=fused), [changed(adapter, tmp_path / "b", change)])

    assert said in str(caught.value)
    assert "mlp.experts" in str(caught.value)


@BOTH_LAYOUTS
@pytest.mark.parametrize(
    ("fields", "weight", "said"),
    [
        ({"modules_to_save": None}, "", "as a whole, which modules_to_save does not say"),
        ({}, "@0.5", "brings whole values, which cannot count 0.5 times"),
    ],
)
def test_what_the_config_does_not_say_and_weights_are_refused(
    fields: dict[str, Any],
    weight: str,
    said: str,
    fused: bool,
    adapter: Path,
    moe: Bases,
    tmp_path: Path,
) -> None:
    other = changed(adapter, tmp_path / "b", lambda _: None, **fields)

    with pytest.raises(InputError, match=said):
        make_plan(moe(fused=fused), [f"{other}{weight}"])


def test_in_a_model_that_is_not_known_they_have_no_parts(
    adapter: Path, moe: Bases, tmp_path: Path
) -> None:
    base = shutil.copytree(moe(), tmp_path / "base")
    edit_json(base / "config.json", model_type="qwen9_moe")

    with pytest.raises(InputError, match="of 'qwen9_moe' nothing tells which way it lies"):
        make_plan(base, [adapter])


@BOTH_LAYOUTS
def test_the_plan_says_what_they_replace(fused: bool, adapter: Path, moe: Bases) -> None:
    plan = make_plan(moe(fused=fused), [adapter])

    said = "\n".join(adapter_lines(plan))
    names = "experts.down_proj, experts.gate_up_proj" if fused else "down_proj, gate_proj, up_proj"
    assert f"whole tensors on {4 if fused else 24} tensors: {names}" in said
    assert counts_of(plan)["replaced"] == (4 if fused else 24)


@BOTH_LAYOUTS
def test_verification_finds_a_wrong_value_of_one(
    fused: bool, adapter: Path, moe: Bases, out: Path
) -> None:
    merge(make_plan(moe(fused=fused), [adapter], shard_bytes=60_000), out)
    assert verify(out, "numeric").ok
    name = "down_proj" if fused else "2.down_proj.weight"

    plant(out, f"model.layers.2.mlp.experts.{name}", row=2 * HIDDEN + 5 if fused else 5)

    assert [check for check, _ in found(out, "numeric")] == ["digest", "copied"]


def test_verification_finds_an_expert_in_the_place_of_another(
    adapter: Path, moe: Bases, out: Path
) -> None:
    merge(make_plan(moe(), [adapter], shard_bytes=60_000), out)
    one, two = (f"model.layers.0.mlp.experts.{n}.up_proj.weight" for n in (1, 2))
    swap(out, one, two)

    wrong = [where for check, where in found(out, "numeric") if check == "copied"]

    assert any(one in where for where in wrong)
    assert any(two in where for where in wrong)


def swap(out: Path, one: str, two: str) -> None:
    files = {file: load_file(file) for file in out.glob("*.safetensors")}
    held = {name: tensors for tensors in files.values() for name in tensors}
    held[one][one], held[two][two] = held[two][two].clone(), held[one][one].clone()
    for file, tensors in files.items():
        save_file(tensors, file, {"format": "pt"})

"""What is not understood of an adapter of another tuner is refused, and named."""

from __future__ import annotations

import importlib.metadata
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from models import Saved, changed, edit_json, make_gpt2
from safetensors.torch import load_file, save_file
from tuners import make_tuned

from merge_core.errors import InputError
from merge_core.factors import seal
from merge_core.merge import merge
from merge_core.planner import make_plan
from merge_core.tuning import TESTED_PEFT


@pytest.mark.parametrize("place", [-1, 10**6])
@pytest.mark.parametrize(
    "kind", ["SHIRA", "SUPERTUNING", "VBLORA, top weights", "UNILORA, indices"]
)
def test_a_place_outside_of_the_layer_is_refused_by_name(
    kind: str, place: int, base: Path, tuned: Callable[..., Path], tmp_path: Path
) -> None:
    adapter = shutil.copytree(tuned(kind), tmp_path / "adapter")
    file = adapter / "adapter_model.safetensors"
    saved = load_file(file)
    key = min(key for key in saved if "indices" in key)
    saved[key].view(-1)[0] = min(place, torch.iinfo(saved[key].dtype).max)
    save_file(saved, file)

    with pytest.raises(InputError, match="names places outside of") as caught:
        merge(make_plan(base, [adapter]), tmp_path / "out", device="cpu")

    (problem,) = caught.value.problems
    assert key in problem.what
    module = key.removeprefix("base_model.model.").rpartition(".")[0]
    assert problem.where == f"{adapter}, module {module}"


@pytest.mark.parametrize(
    ("kind", "fields", "said"),
    [
        ("PEANUT", {"depth": 1}, "peanut_decoders.0.weight, peanut_encoders.0.weight is missing"),
        ("ADAMSS", {"num_subspaces": 4}, "adamss_A.3, adamss_B.3 is missing"),
        ("ADAMSS", {"num_subspaces": 10**15}, "is missing"),
        ("ADAMSS", {"num_subspaces": 2}, "adamss_A.2, adamss_B.2 is there without"),
        ("WAVEFT", {"proportional_parameters": True}, "not [n_frequency] with n_frequency = 60"),
        ("LOHA", {"next_thing": 3}, "field 'next_thing' = 3 is not known"),
        ("LOHA", {"rank_pattern": {"(": 3}}, "rank_pattern is"),
        ("LOHA", {"bias": "some"}, "bias is 'some'"),
        (
            "LOHA",
            {"r": 4},
            "'base_model.model.model.layers.0.self_attn.o_proj.hada_w1_a' has shape",
        ),
        ("OFT", {"peft_version": "0.17.1"}, "counted the last term of the series twice"),
        ("OFT", {"peft_version": None}, "counted the last term of the series twice"),
        ("OFT", {"peft_version": 17}, "counted the last term of the series twice"),
        ("OFT", {"peft_version": None, "use_cayley_neumann": None}, "peft_version is None"),
        ("OFT", {"peft_version": None, "use_cayley_neumann": False}, None),
        ("OFT", {"peft_version": "0.18.0"}, None),
        ("VERA", {"save_projection": None}, None),
    ],
)
def test_what_is_not_understood_of_a_config_is_refused(
    kind: str, fields: dict[str, object], said: str | None, base: Path, tmp_path: Path
) -> None:
    adapter = make_tuned(tmp_path / "adapter", base, kind)
    edit_json(adapter / "adapter_config.json", **fields)
    if said is None:
        assert len(make_plan(base, [adapter]).adapters) == 1
        return

    with pytest.raises(InputError) as caught:
        make_plan(base, [adapter])

    assert said in str(caught.value)
    assert all(str(adapter) in problem.where for problem in caught.value.problems)


def test_the_workers_must_have_the_peft_that_was_planned_with(
    base: Path, tuned: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan(base, [tuned("VERA")])
    before = seal(plan).fingerprint
    monkeypatch.setattr("importlib.metadata.version", lambda _: f"{TESTED_PEFT}.99")
    other = make_plan(base, [tuned("VERA")])

    with pytest.raises(InputError, match=r"0\.21\.99 where it was planned"):
        merge(other, tmp_path / "out", device="cpu")

    assert seal(other).fingerprint != before


def test_what_a_layer_takes_in_memory_is_no_part_of_the_fingerprint(
    base: Path, tuned: Callable[..., Path]
) -> None:
    plan = seal(make_plan(base, [tuned("VERA")]))
    (adapter,) = plan.adapters
    assert adapter.tuning is not None

    needs, config = {"copies": 9, "squares": 9, "always": 9}, {**adapter.tuning.config, "r": 9}
    same, other = replace(adapter.tuning, **needs), replace(adapter.tuning, config=config)

    fingerprints = [
        replace(plan, adapters=(replace(adapter, tuning=tuning),)).fingerprint
        for tuning in (same, other)
    ]
    assert fingerprints[0] == plan.fingerprint != fingerprints[1]


@pytest.mark.parametrize("version", ["0.20.0", "0.22.0", "1.21.0"])
def test_a_peft_that_the_tests_do_not_compare_with_is_refused(
    version: str, base: Path, tuned: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = tuned("VERA")
    monkeypatch.setattr("importlib.metadata.version", lambda _: version)

    with pytest.raises(InputError, match=f"{version} is installed, which no test compares with"):
        make_plan(base, [adapter])


def test_a_field_that_the_installed_peft_does_not_know_ends_the_merge(
    base: Path, tuned: Callable[..., Path], tmp_path: Path
) -> None:
    plan = make_plan(base, [tuned("VERA")])
    (adapter,) = plan.adapters
    assert adapter.tuning is not None
    tuning = replace(adapter.tuning, config={**adapter.tuning.config, "next_thing": 2})

    with pytest.raises(InputError, match="does not know the field next_thing"):
        merge(replace(plan, adapters=(replace(adapter, tuning=tuning),)), tmp_path / "out")


def test_clusters_that_peft_makes_of_another_base_are_refused(
    tuned: Callable[..., Path], bases: Callable[..., Path], tmp_path: Path
) -> None:
    other = bases("BF16", seed=5)

    with pytest.raises(InputError, match="of this base") as caught:
        merge(make_plan(other, [tuned("ADAMSS")]), tmp_path / "out")

    assert "same kind of device" in caught.value.problems[0].remedy


def test_clusters_of_a_decomposition_that_is_not_that_of_the_file_are_refused(
    base: Path, tuned: Callable[..., Path], tmp_path: Path
) -> None:
    def flip(saved: Saved) -> None:
        key = min(key for key in saved if key.endswith("adamss_newB"))
        saved[key][3] *= -1  # as another device may find it

    adapter = changed(tuned("ADAMSS"), tmp_path / "adapter", flip)

    with pytest.raises(InputError, match="newB is not what PEFT makes of this base"):
        merge(make_plan(base, [adapter]), tmp_path / "out")


def test_a_tuner_that_needs_another_package_says_how_to_get_it(
    base: Path, tuned: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter, version = tuned("ADAMSS"), importlib.metadata.version

    def lacking(name: str) -> str:
        if name == "scikit-learn":
            raise importlib.metadata.PackageNotFoundError
        return version(name)

    monkeypatch.setattr("importlib.metadata.version", lacking)

    with pytest.raises(InputError, match="scikit-learn, which is not installed") as caught:
        make_plan(base, [adapter])

    assert "pip install scikit-learn" in caught.value.problems[0].remedy


def test_what_is_drawn_for_each_input_is_merged_as_its_mean_and_said(
    base: Path, tuned: Callable[..., Path]
) -> None:
    (note,) = make_plan(base, [tuned("PVERA, sampled")]).notes

    assert "what is merged is the mean" in note
    assert not make_plan(base, [tuned("PVERA")]).notes


def test_a_machine_without_peft_says_so(
    base: Path, tuned: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = tuned("VERA")
    plan = make_plan(base, [adapter])
    monkeypatch.setitem(sys.modules, "merge_core.updates.peft_layer", None)

    with pytest.raises(InputError, match="cannot be imported on this machine") as caught:
        merge(plan, tmp_path / "out")

    assert caught.value.problems[0].where == str(adapter)


def test_a_tuner_that_numbers_its_layers_needs_a_model_that_is_known(tmp_path: Path) -> None:
    base = make_gpt2(tmp_path / "base", torch.bfloat16)
    fields = {"target_modules": ["c_attn"], "fan_in_fan_out": True}
    adapter = make_tuned(tmp_path / "adapter", base, "TINYLORA", **fields)

    with pytest.raises(InputError, match="TINYLORA depends on the order of the layers"):
        make_plan(base, [adapter])

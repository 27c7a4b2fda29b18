"""Where each tensor of the adapters went, and the singular values of what became of them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from handmade import TWO_LANES, header_of, write_adapter
from models import make_adapter, read_tensors
from moe import write_expert_adapter, write_fused_adapter
from typer.testing import CliRunner

from cluster.cli import app
from cluster.report.accounting import key_table, summary, uses
from cluster.report.changes import changed, heat_map
from cluster.report.evidence import Evidence, read_evidence
from cluster.report.facts import inputs
from cluster.report.spectrum import spectra
from merge_core.merge import merge
from merge_core.plan import MergePlan
from merge_core.planner import make_plan
from merge_core.stores.location import locate


def accounted(evidence: Evidence) -> None:
    """Every tensor of every adapter is there once, and went where the result has a tensor."""
    keys = [
        (number, key)
        for number, adapter in enumerate(evidence.plan["adapters"])
        for key in header_of(Path(adapter["path"]) / "adapter_model.safetensors")
        if key != "__metadata__"
    ]
    found, there = uses(evidence), {task["target"]["name"] for task in evidence.tasks}
    assert [(use.adapter, use.key) for use in found] == sorted(keys)
    assert all(set(use.targets) <= there for use in found)
    assert sum(count for _, _, count, _ in summary(found)) == len(keys)


def test_every_key_of_lora_with_all_its_features_is_accounted_for(
    bases: Callable[..., Path], tmp_path: Path
) -> None:
    options = {"use_dora": True, "bias": "all", "modules_to_save": ["lm_head"]}
    base = bases("BF16", shard="40KB")
    adapter = make_adapter(
        tmp_path / "a", base, target_modules=["q_proj", "embed_tokens"], **options
    )
    plan = make_plan(base, [adapter])
    merge(plan, tmp_path / "out", choice=TWO_LANES)
    evidence = read_evidence(locate(tmp_path / "out"))

    accounted(evidence)
    kinds = {use.kind for use in uses(evidence)}
    assert kinds >= {"DoRA", "whole tensors"}


def test_factors_that_experts_share_go_into_all_of_them(
    moe: Callable[..., Path], tmp_path: Path
) -> None:
    one = write_fused_adapter(tmp_path / "1", moe(), swapped=False, peft_version="0.21.0")
    two = write_expert_adapter(tmp_path / "2", moe(), ["up_proj"], lora_alpha=6)
    merge(make_plan(moe(), [one, f"{two}@0.5"]), tmp_path / "out", choice=TWO_LANES)
    evidence = read_evidence(locate(tmp_path / "out"))

    accounted(evidence)
    assert any(" and 3 more" in row[3] for row in key_table(uses(evidence), evidence).rows)
    heat = heat_map(evidence.tensors)
    experts = heat.modules.index("mlp.experts.*.up_proj")
    assert {count for _, module, _, count in heat.cells if module == experts} == {4}


def test_tensors_that_all_layers_of_a_tuner_read_are_accounted_for(
    tuned: Callable[..., Path], bases: Callable[..., Path], tmp_path: Path
) -> None:
    merge(make_plan(bases("BF16", shard="80KB"), [tuned("VERA")]), tmp_path / "out")
    evidence = read_evidence(locate(tmp_path / "out"))

    accounted(evidence)
    shared = [use for use in uses(evidence) if not use.targets]
    assert {use.key.rsplit(".", 1)[-1] for use in shared} == {"vera_A", "vera_B"}
    (one,) = spectra(evidence, 1)
    assert one.why == "layers merged by PEFT: the delta is no product of factors"


def test_adapters_that_were_combined_are_accounted_for(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    from merge_core.updates.combined import Combination

    two = make_adapter(tmp_path / "two", base, r=8, seed=9)
    combination = Combination(method="ties", density=0.5)
    merge(make_plan(base, [adapter, two], combination=combination), tmp_path / "out")
    evidence = read_evidence(locate(tmp_path / "out"))

    accounted(evidence)
    recipe = next(fact.text for fact in inputs(evidence) if fact.label == "Recipe")
    assert recipe == "combine ties, density 0.5, written as BF16"


def test_singular_values_are_those_of_the_whole_delta(
    bases: Callable[..., Path], tmp_path: Path
) -> None:
    """Two adapters summed, and an embedding, whose delta is transposed."""
    base = bases("F32", shard="40KB")
    modules = ["q_proj", "down_proj", "embed_tokens"]
    paths = [
        make_adapter(tmp_path / f"{n}", base, r=3 + n, seed=n, target_modules=modules)
        for n in range(2)
    ]
    merge(make_plan(base, [paths[0], f"{paths[1]}@-0.5"]), tmp_path / "out", choice=TWO_LANES)
    evidence = read_evidence(locate(tmp_path / "out"))
    before, after = read_tensors(base), read_tensors(tmp_path / "out")
    found = spectra(evidence, 100)

    assert len(found) == len(changed(evidence.tensors))
    assert "model.embed_tokens.weight" in {one.tensor for one in found}
    for one in found:
        delta = after[one.tensor].double() - before[one.tensor].double()
        wanted = torch.linalg.svdvals(delta)[: len(one.values)].tolist()
        assert len(one.values) == 7
        assert one.values == pytest.approx(wanted, rel=1e-3, abs=1e-6)
        square = sum(value**2 for value in wanted)
        assert one.stable_rank == pytest.approx(square / wanted[0] ** 2, rel=1e-3)


def test_singular_values_of_an_adapter_that_changed_are_not_made_up(
    small: MergePlan, out: Path, tmp_path: Path
) -> None:
    adapter = shutil.copytree(small.adapters[0].path.local, tmp_path / "adapter")
    merge(make_plan(small.base, [adapter]), out, choice=TWO_LANES)
    write_adapter(
        adapter, {"model.layers.0.self_attn.q_proj": (torch.ones(1, 32), torch.ones(32, 1))}
    )
    (one, _) = spectra(read_evidence(locate(out)), 2)

    assert one.values == ()
    assert "adapter_model.safetensors" in one.why
    page = tmp_path / "page.html"
    words = ["report", str(out), "--spectrum", "2", "--output", str(page)]
    said = CliRunner().invoke(app, words, catch_exceptions=False).stdout.splitlines()
    assert said[2:] == [f"note     no singular values: {one.why}"]  # once, whoever asked for two

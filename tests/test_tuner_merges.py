"""Adapters of other tuners beside others, with weights, on other layers, within memory."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from models import assert_same_tensors, edit_json, make_adapter, make_gpt2, read_tensors
from safetensors.torch import load_file, save_file
from tuners import make_tuned, merged_by_peft

from cluster.explain import adapter_documents, adapter_lines
from merge_core.errors import DeviceMemoryError, InputError
from merge_core.memory import Memory, choose_lanes, lane_need
from merge_core.merge import merge
from merge_core.peft_tuners import TUNERS
from merge_core.planner import make_plan
from merge_core.updates.tuning import Kind

Q = "model.layers.0.self_attn.q_proj"
CONV1D = ["IA3", "VERA", "ADALORA", "DEFT", "FOURIERFT", "GRALORA", "HIRA", "PVERA", "RANDLORA"]
CONV1D += ["VBLORA", "WAVEFT"]


def close(one: torch.Tensor, two: torch.Tensor) -> bool:
    """Equal up to the rounding of a few sums in float32."""
    return torch.allclose(one.float(), two.float(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["IA3", "LOHA", "OFT", "ROAD"])
def test_a_weight_takes_that_much_of_the_whole_change(
    kind: str, bases: Callable[..., Path], tmp_path: Path
) -> None:
    base = bases("F32", shard="80KB")
    adapter = make_tuned(tmp_path / "adapter", base, kind)

    merge(make_plan(base, [f"{adapter}@-0.5"], shard_bytes=70_000), tmp_path / "out")

    before, whole, got = (
        read_tensors(base),
        merged_by_peft(base, adapter),
        read_tensors(tmp_path / "out"),
    )
    assert all(close(got[n], w - 0.5 * (whole[n] - w)) for n, w in before.items())
    assert not close(got[f"{Q}.weight"], before[f"{Q}.weight"])


def test_the_changes_of_several_adapters_of_any_kind_are_summed(
    bases: Callable[..., Path], tmp_path: Path
) -> None:
    base = bases("F32", shard="80KB")
    adapters = [
        make_adapter(tmp_path / "lora", base, r=4, target_modules=["q_proj", "k_proj"]),
        make_adapter(tmp_path / "dora", base, r=4, use_dora=True, target_modules=["q_proj"]),
        make_tuned(tmp_path / "hra", base, "HRA"),
        make_tuned(tmp_path / "ia3", base, "IA3"),
    ]

    merge(make_plan(base, adapters, shard_bytes=70_000), tmp_path / "out")

    before, got = read_tensors(base), read_tensors(tmp_path / "out")
    alone = [merged_by_peft(base, adapter) for adapter in adapters]
    for name, tensor in before.items():
        assert close(got[name], tensor + sum(one[name] - tensor for one in alone)), name


@pytest.mark.parametrize("kind", CONV1D)
def test_a_conv1d_layer_is_merged_as_peft_merges_it(kind: str, tmp_path: Path) -> None:
    base = make_gpt2(tmp_path / "base", torch.bfloat16)
    fields = {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}
    changes = {"feedforward_modules": ["c_fc"]} if kind == "IA3" else {}
    adapter = make_tuned(tmp_path / "adapter", base, kind, **fields, **changes)

    merge(make_plan(base, [adapter]), tmp_path / "out")

    wanted = {name: tensor.bfloat16() for name, tensor in merged_by_peft(base, adapter).items()}
    assert_same_tensors(read_tensors(tmp_path / "out"), wanted)


@pytest.mark.parametrize("end", ["embed_tokens", "lm_head"])
@pytest.mark.parametrize("keep", [False, True])
def test_of_tied_embeddings_the_end_that_was_trained_changes(
    end: str, keep: bool, bases: Callable[..., Path], tmp_path: Path
) -> None:
    base = bases("BF16", tie_word_embeddings=True)
    adapter = make_tuned(tmp_path / "adapter", base, "HIRA", target_modules=[end])

    merge(make_plan(base, [adapter], keep_tied=keep), tmp_path / "out")

    before, got = read_tensors(base), read_tensors(tmp_path / "out")
    embeddings, head = "model.embed_tokens.weight", "lm_head.weight"
    old, new = before[embeddings], changed_by_hira(before[embeddings], adapter)
    wanted = {embeddings: new if keep or end == "embed_tokens" else old}
    if not keep:
        wanted[head] = new if end == "lm_head" else old
    assert got.keys() - before.keys() == wanted.keys() - before.keys()
    assert all(torch.equal(got[name], tensor) for name, tensor in wanted.items())


def changed_by_hira(weight: torch.Tensor, adapter: Path) -> torch.Tensor:
    """W * (1 + B @ A) in float32, rounded once; arXiv 2410.23870 without a scale."""
    saved = load_file(adapter / "adapter_model.safetensors")
    embedding = any("embedding" in key for key in saved)
    factors = {key[-1]: tensor for key, tensor in saved.items() if "hira" in key}
    product = factors["B"] @ factors["A"]
    return (weight.float() + weight.float() * (product.T if embedding else product)).to(
        weight.dtype
    )


def test_every_tuner_of_conv1d_layers_is_tested() -> None:
    assert {kind for kind, t in TUNERS.items() if Kind.CONV1D in t.kinds} == set(CONV1D)


def test_what_all_share_need_not_be_saved_with_each_layer(
    base: Path, tuned: Callable[..., Path], tmp_path: Path
) -> None:
    adapter = shutil.copytree(tuned("RANDLORA"), tmp_path / "adapter")
    file = adapter / "adapter_model.safetensors"
    saved = load_file(file)
    kept = {k: t for k, t in saved.items() if "layers" not in k or k.endswith(("gamma", "lambda"))}
    assert len(kept) < len(saved)
    save_file(kept, file)

    merge(make_plan(base, [adapter]), tmp_path / "out")

    wanted = {name: tensor.bfloat16() for name, tensor in merged_by_peft(base, adapter).items()}
    assert_same_tensors(read_tensors(tmp_path / "out"), wanted)


@pytest.mark.parametrize("kind", ["SHIRA", "IA3"])
def test_a_pickled_adapter_is_the_same_adapter(
    kind: str, base: Path, tuned: Callable[..., Path], tmp_path: Path
) -> None:
    adapter = shutil.copytree(tuned(kind), tmp_path / "adapter")
    torch.save(load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()

    merge(make_plan(base, [adapter]), tmp_path / "out")
    merge(make_plan(base, [tuned(kind)]), tmp_path / "other")

    assert_same_tensors(read_tensors(tmp_path / "out"), read_tensors(tmp_path / "other"))


def test_a_head_that_kasa_has_cut_down_is_not_cut_down_again(base: Path, tmp_path: Path) -> None:
    fields = {"target_modules": ["lm_head", "q_proj"], "rank_pattern": {}}
    saved = make_tuned(tmp_path / "saved", base, "KASA", **fields)
    lean = make_tuned(tmp_path / "lean", base, "KASA", save_embedding_layers=False, **fields)

    with pytest.raises(InputError, match="KaSA would cut it once more") as caught:
        make_plan(base, [saved])
    assert caught.value.problems[0].where == f"{saved}, module lm_head"

    merge(make_plan(base, [lean]), tmp_path / "out")
    wanted = {name: tensor.bfloat16() for name, tensor in merged_by_peft(base, lean).items()}
    assert_same_tensors(read_tensors(tmp_path / "out"), wanted)


def test_a_head_that_peft_saved_beside_what_all_layers_share_is_merged(
    base: Path, tmp_path: Path
) -> None:
    adapter = make_tuned(
        tmp_path / "adapter", base, "UNILORA", target_modules=["q_proj", "lm_head"]
    )
    saved = load_file(adapter / "adapter_model.safetensors")
    assert saved.keys() > {"base_model.model.lm_head.base_layer.weight"}

    merge(make_plan(base, [adapter]), tmp_path / "out")

    wanted = {name: tensor.bfloat16() for name, tensor in merged_by_peft(base, adapter).items()}
    assert_same_tensors(read_tensors(tmp_path / "out"), wanted)
    assert not torch.equal(wanted["lm_head.weight"], read_tensors(base)["lm_head.weight"])


def test_norms_that_have_a_bias_are_replaced_with_it(tmp_path: Path) -> None:
    base = make_gpt2(tmp_path / "base", torch.bfloat16)
    adapter = make_tuned(tmp_path / "adapter", base, "LN_TUNING", target_modules=["ln_1"])

    merge(make_plan(base, [adapter]), tmp_path / "out")

    wanted = {name: tensor.bfloat16() for name, tensor in merged_by_peft(base, adapter).items()}
    assert_same_tensors(read_tensors(tmp_path / "out"), wanted)
    bias = "transformer.h.0.ln_1.bias"
    assert not torch.equal(read_tensors(base)[bias], wanted[bias])


def test_adalora_keeps_the_rank_that_was_left_and_old_files_say_ranknum(
    base: Path, tmp_path: Path
) -> None:
    adapter = make_tuned(tmp_path / "adapter", base, "ADALORA")
    file = adapter / "adapter_model.safetensors"
    saved, pattern = load_file(file), {}
    for key in [key for key in saved if key.endswith("lora_E")]:
        module = key.removesuffix(".lora_E")
        kept = [True, False, True, True, False, True] if "q_proj" in key else [True] * 6
        pattern[f"{module.removeprefix('base_model.model.')}.lora_E"] = kept
        for part, dim in (("lora_A", 0), ("lora_E", 0), ("lora_B", 1)):
            places = torch.tensor([n for n, one in enumerate(kept) if one])
            saved[f"{module}.{part}"] = saved[f"{module}.{part}"].index_select(dim, places)
        saved[f"{module}.ranknum"] = torch.tensor([6.0])
    save_file(saved, file)
    edit_json(adapter / "adapter_config.json", rank_pattern=pattern)

    merge(make_plan(base, [adapter], shard_bytes=70_000), tmp_path / "out")

    wanted = {name: tensor.bfloat16() for name, tensor in merged_by_peft(base, adapter).items()}
    assert_same_tensors(read_tensors(tmp_path / "out"), wanted)


def test_the_memory_of_a_layer_that_peft_merges_is_asked_for_once(
    base: Path, tmp_path: Path
) -> None:
    plan = make_plan(base, [make_tuned(tmp_path / "adapter", base, "OFT")])

    need = lane_need(plan, "cpu", 1 << 20)

    largest = 3 * 96 * 64 + 2 * 96**2 + 2 * 6 * 120  # up or down, and the adapter's of down
    assert need.alone == 4 * largest
    assert need.factors == 4 * 96 * 64
    assert need.on_host(2, "cpu") - need.on_host(1, "cpu") < need.on_host(1, "cpu") - need.alone
    enough = need.on_host(1, "cpu") / 0.8
    assert choose_lanes(plan, "cpu", Memory(host=int(enough) + (2 << 20), device=None)).lanes == 1
    with pytest.raises(DeviceMemoryError, match="one lane needs"):
        choose_lanes(plan, "cpu", Memory(host=need.alone, device=None))


def test_the_plan_says_what_peft_merges_and_in_how_much_memory(base: Path, tmp_path: Path) -> None:
    adapter = make_tuned(tmp_path / "adapter", base, "PSOFT")
    plan = make_plan(base, [adapter])

    assert [line.strip() for line in adapter_lines(plan)] == [
        f"adapter  {adapter}, weight 1: PSOFT",
        "layers merged by PEFT on 8 tensors: down_proj, o_proj, q_proj, up_proj",
        "one layer at a time, in 0 MB",
    ]
    (document,) = adapter_documents(plan)
    assert document["peft_bytes"] == lane_need(plan, "cpu", 1 << 20).alone > 0
    assert any("another kind of device" in note for note in plan.notes)
    assert any("decomposes each layer (SVD)" in note for note in plan.notes)


def test_the_random_numbers_of_the_process_are_left_alone(
    base: Path, tuned: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def seed_all(_: int) -> None:
        pytest.fail("generators of GPUs that are not kept are seeded")

    adapter, before = tuned("HRA"), torch.random.get_rng_state()
    monkeypatch.setattr("torch.cuda.manual_seed_all", seed_all)

    merge(make_plan(base, [adapter]), tmp_path / "out", device="cpu")

    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_plan_travels_to_the_workers(base: Path, tmp_path: Path) -> None:
    plan = make_plan(base, [make_tuned(tmp_path / "adapter", base, "VERA")])

    assert pickle.loads(pickle.dumps(plan)) == plan

"""Tied embeddings and head: the merged model answers as base and adapter do when they run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import edit_json, make_adapter, read_tensors, run_adapter
from peft import TrainableTokensConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from merge_core.errors import InputError
from merge_core.merge import merge
from merge_core.planner import make_plan
from merge_core.verify import verify

pytestmark = [
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied"),
    pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True` and the tied"),
]
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
NEW_TOKENS = TrainableTokensConfig(token_indices=[160, 169], target_modules=["embed_tokens"])
TOKENS = TrainableTokensConfig(token_indices=[2, 3], target_modules=["embed_tokens"])

UNTIED: dict[str, dict[str, Any]] = {
    "LoRA on the embeddings": {"target_modules": ["embed_tokens"]},
    "LoRA on the head": {"target_modules": ["q_proj", "lm_head"]},
    "LoRA on both, apart": {"target_modules": ["embed_tokens", "lm_head"]},
    "DoRA on the head": {"target_modules": ["lm_head"], "use_dora": True},
    "whole embeddings": {"modules_to_save": ["embed_tokens"]},
    "a whole head": {"modules_to_save": ["lm_head"]},
    "LoRA on the head, whole embeddings": {
        "target_modules": ["q_proj", "lm_head"],
        "modules_to_save": ["model.embed_tokens"],
    },
    "both whole, apart": {"modules_to_save": ["embed_tokens", "lm_head"]},
}
TIED: dict[str, dict[str, Any]] = {
    "neither": {},
    "LoRA on both as one": {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
    "both whole as one": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "trained tokens": {"trainable_token_indices": [1, 5, 7]},
    "the tuner of trained tokens": {"config": TOKENS},
}


@pytest.fixture
def base(bases: Callable[..., Path]) -> Path:
    return bases("F32", shard="80KB", tie_word_embeddings=True)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(2, 40)[None]).logits


def check_answers(base: Path, adapter: Path, out: Path, vocabulary: int | None = None) -> None:
    merge(make_plan(base, [adapter], shard_bytes=70_000), out)

    wanted = logits(run_adapter(base, adapter, vocabulary))
    got = logits(AutoModelForCausalLM.from_pretrained(out))
    assert got.shape == wanted.shape
    assert torch.allclose(got, wanted, rtol=1e-4, atol=1e-4)
    assert verify(out, "numeric").findings == ()
    assert verify(out, "load").findings == ()


def config_of(out: Path) -> dict[str, Any]:
    return dict(json.loads((out / "config.json").read_text()))


@pytest.mark.parametrize("feature", UNTIED)
def test_ends_that_were_trained_apart_are_untied(
    base: Path, feature: str, tmp_path: Path, out: Path
) -> None:
    adapter = make_adapter(tmp_path / "adapter", base, **UNTIED[feature])

    check_answers(base, adapter, out)

    assert HEAD in read_tensors(out)
    assert config_of(out)["tie_word_embeddings"] is False
    notes = make_plan(base, [adapter]).notes
    assert any("embeddings and head are untied" in note for note in notes)


@pytest.mark.parametrize("feature", TIED)
def test_ends_that_were_trained_as_one_stay_tied(
    base: Path, feature: str, tmp_path: Path, out: Path
) -> None:
    adapter = make_adapter(tmp_path / "adapter", base, **TIED[feature])

    check_answers(base, adapter, out)

    assert HEAD not in read_tensors(out)
    assert config_of(out)["tie_word_embeddings"] is True


def test_tied_ends_that_were_to_be_one_and_are_not_are_refused(
    base: Path, tmp_path: Path, out: Path
) -> None:
    adapter = make_adapter(tmp_path / "adapter", base, **TIED["both whole as one"])
    file = adapter / "adapter_model.safetensors"
    saved = load_file(file)
    saved[f"base_model.model.{HEAD}"][3, 3] += 1
    save_file(saved, file)

    with pytest.raises(InputError, match=r"lm_head\.weight' should hold the values of"):
        merge(make_plan(base, [adapter]), out)
    assert not out.exists()


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_keep_tied_applies_to_both_ends_what_was_trained_of_one(
    base: Path, target: str, tmp_path: Path, out: Path
) -> None:
    """As PEFT's merge does, which changes the one tensor that both ends are."""
    adapter = make_adapter(tmp_path / "adapter", base, target_modules=[target])

    merge(make_plan(base, [adapter], keep_tied=True), out)

    assert verify(out, "numeric").findings == ()
    edit_json(out / ".raymeld" / "plan.json", keep_tied=False)
    found = [finding.what for finding in verify(out, "numeric").findings]
    assert "embeddings and head were trained apart, and there is one tensor for both" in found
    merged = run_adapter(base, adapter).merge_and_unload()
    state = merged.state_dict()
    assert torch.allclose(read_tensors(out)[EMBED], state[EMBED], rtol=1e-6, atol=1e-7)
    assert HEAD not in read_tensors(out)
    assert config_of(out)["tie_word_embeddings"] is True


def test_keep_tied_adds_up_what_dora_on_each_end_changes(
    base: Path, tmp_path: Path, out: Path
) -> None:
    both = ["embed_tokens", "lm_head"]
    adapter = make_adapter(tmp_path / "adapter", base, target_modules=both, use_dora=True)
    merge(make_plan(base, [adapter]), tmp_path / "apart")

    merge(make_plan(base, [adapter], keep_tied=True), out)

    before, apart = read_tensors(base)[EMBED], read_tensors(tmp_path / "apart")
    wanted = apart[EMBED] + apart[HEAD] - before
    assert torch.allclose(read_tensors(out)[EMBED], wanted, rtol=1e-5, atol=1e-6)
    assert verify(out, "numeric").findings == ()


def test_tokens_and_factors_of_tied_ends_are_refused_with_a_way_out(
    base: Path, tmp_path: Path
) -> None:
    fields = {"trainable_token_indices": [1, 5], "target_modules": ["lm_head"]}
    adapter = make_adapter(tmp_path / "adapter", base, **fields)

    with pytest.raises(InputError, match="Train either tokens or factors of embeddings and head"):
        make_plan(base, [adapter])


@pytest.mark.parametrize(
    ("field", "names"),
    [("target_modules", ["q_proj", "lm_head"]), ("modules_to_save", ["lm_head"])],
)
def test_a_tied_head_of_which_nothing_is_left_is_named(
    base: Path, field: str, names: list[str], tmp_path: Path
) -> None:
    fields = {"target_modules": ["q_proj"], field: names}
    adapter = make_adapter(tmp_path / "adapter", base, **fields)
    file = adapter / "adapter_model.safetensors"
    save_file({k: t for k, t in load_file(file).items() if "lm_head" not in k}, file)

    with pytest.raises(InputError, match=f"{field} covers lm_head"):
        make_plan(base, [adapter])


RESIZED: dict[str, tuple[dict[str, Any], bool]] = {
    "LoRA elsewhere": ({"target_modules": ["q_proj"]}, True),
    "LoRA on both": ({"target_modules": ["q_proj", "embed_tokens", "lm_head"]}, True),
    "both whole": ({"modules_to_save": ["lm_head", "embed_tokens"]}, True),
    "both whole as one": (
        {"modules_to_save": ["lm_head", "embed_tokens"], "ensure_weight_tying": True},
        True,
    ),
    "whole embeddings": ({"modules_to_save": ["embed_tokens"]}, True),
    "a whole head": ({"modules_to_save": ["lm_head"]}, True),
    "trained tokens": ({"trainable_token_indices": [160, 165]}, True),
    # PEFT saves no head where the embeddings have factors, or rows of their own tuner.
    "LoRA on the embeddings": ({"target_modules": ["embed_tokens"]}, False),
    "the tuner of trained tokens": ({"config": NEW_TOKENS}, False),
}
"""What was trained after the vocabulary grew, and whether PEFT saves enough of an untied model."""


@pytest.mark.filterwarnings("ignore:ensure_weight_tying=True but the model does not have tied")
@pytest.mark.filterwarnings("ignore:You have requested `ensure_weight_tying`")
@pytest.mark.parametrize("story", RESIZED)
@pytest.mark.parametrize("tied", [True, False])
def test_a_resized_vocabulary_is_taken_from_the_adapter(
    bases: Callable[..., Path], tied: bool, story: str, tmp_path: Path, out: Path
) -> None:
    fields, enough = RESIZED[story]
    base = bases("F32", shard="80KB", tie_word_embeddings=tied)
    adapter = make_adapter(tmp_path / "adapter", base, vocabulary=170, **fields)
    if not (tied or enough):
        with pytest.raises(InputError, match="resized at one end only"):
            make_plan(base, [adapter])
        return

    check_answers(base, adapter, out, vocabulary=170)

    assert config_of(out)["vocab_size"] == 170
    assert read_tensors(out)[EMBED].shape == (170, 64)


def test_a_module_that_was_saved_twice_with_different_values_is_refused(
    base: Path, tmp_path: Path, out: Path
) -> None:
    adapter = make_adapter(
        tmp_path / "adapter", base, vocabulary=170, modules_to_save=["lm_head", "embed_tokens"]
    )
    file = adapter / "adapter_model.safetensors"
    saved = load_file(file)
    saved["base_model.model.lm_head.modules_to_save.weight"][3, 3] += 1
    save_file(saved, file)

    with pytest.raises(InputError, match=r"modules_to_save\.weight' should hold the values of"):
        merge(make_plan(base, [adapter]), out)


def test_adapters_with_vocabularies_of_different_sizes_are_refused_and_both_named(
    base: Path, tmp_path: Path
) -> None:
    one, two = (
        make_adapter(tmp_path / str(n), base, vocabulary=n, target_modules=["q_proj"])
        for n in (170, 180)
    )

    said = rf"{two}, tensor .*embed_tokens.weight'.* is \[180, 64\], and \[170, 64\] in {one}"
    with pytest.raises(InputError, match=said):
        make_plan(base, [one, two])


def test_adapters_with_vocabularies_of_other_values_are_both_named(
    base: Path, tmp_path: Path, out: Path
) -> None:
    one, two = (
        make_adapter(tmp_path / str(n), base, vocabulary=170, seed=n, target_modules=["q_proj"])
        for n in (1, 2)
    )
    file = two / "adapter_model.safetensors"
    save_file({k: t + 1 if "embed" in k else t for k, t in load_file(file).items()}, file)

    said = rf"{two}: .*embed_tokens.weight' should hold the values of .* in {one}, and does not"
    with pytest.raises(InputError, match=said):
        merge(make_plan(base, [one, two]), out)

"""Bases that tie head and embeddings and store both, as Qwen1.5-0.5B-Chat was published."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import assert_same_tensors, edit_json, make_adapter, read_tensors
from safetensors.torch import load_file, save_file

from merge_core.errors import InputError
from merge_core.merge import merge
from merge_core.planner import make_plan
from merge_core.stores.location import locate
from merge_core.verify import verify

pytestmark = [
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied"),
    pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True` and the tied"),
]
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture
def base(bases: Callable[..., Path]) -> Path:
    return bases("BF16", tie_word_embeddings=True)


def with_head(base: Path, path: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> Path:
    shutil.copytree(base, path)
    file = path / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, HEAD: change(tensors[EMBED].clone())}, file, {"format": "pt"})
    return path


@pytest.mark.parametrize("target", ["q_proj", "lm_head", "embed_tokens"])
def test_a_stored_head_that_repeats_the_embeddings_changes_nothing(
    base: Path, target: str, tmp_path: Path, out: Path
) -> None:
    """Whether an adapter leaves both tied, or unties them."""
    adapter = make_adapter(tmp_path / "adapter", base, target_modules=[target])
    both = with_head(base, tmp_path / "both", torch.Tensor.contiguous)
    merge(make_plan(base, [adapter]), tmp_path / "once")

    plan = make_plan(both, [adapter])
    merge(plan, out, level="numeric")

    assert any("is left out, as loaders do" in note for note in plan.notes)
    assert_same_tensors(read_tensors(out), read_tensors(tmp_path / "once"))
    assert (out / "config.json").read_text() == (tmp_path / "once/config.json").read_text()
    assert verify(out, "load").findings == ()


def last_value(head: torch.Tensor) -> torch.Tensor:
    head[-1, -1] += 1
    return head


def refused_of(base: Path, adapter: Path, out: Path) -> str:
    with pytest.raises(InputError) as caught:
        merge(make_plan(base, [adapter]), out)
    assert not out.exists()
    return str(caught.value)


CHANGES: dict[str, tuple[Any, str]] = {
    "one value": (last_value, "with other values than 'model.embed_tokens.weight'"),
    "a row more": (
        lambda head: torch.cat([head, head[:1]]),
        "as [161, 64], and 'model.embed_tokens.weight' as [160, 64]",
    ),
    "another dtype": (torch.Tensor.float, "in F32, and 'model.embed_tokens.weight' in BF16"),
}


@pytest.mark.parametrize("story", CHANGES)
def test_a_stored_head_that_differs_from_tied_embeddings_is_refused(
    base: Path, story: str, tmp_path: Path, out: Path
) -> None:
    adapter = make_adapter(tmp_path / "adapter", base, target_modules=["q_proj"])
    change, how = CHANGES[story]
    both = with_head(base, tmp_path / "both", change)

    said = refused_of(both, adapter, out)

    assert f"'lm_head.weight' is stored {how}" in said
    assert "Set tie_word_embeddings to false" in said


def test_a_head_of_its_own_is_merged_once_the_config_says_so(
    base: Path, tmp_path: Path, out: Path
) -> None:
    adapter = make_adapter(tmp_path / "adapter", base, target_modules=["q_proj"])
    both = with_head(base, tmp_path / "both", last_value)
    edit_json(both / "config.json", tie_word_embeddings=False)

    merge(make_plan(both, [adapter]), out, level="numeric")

    assert torch.equal(read_tensors(out)[HEAD], read_tensors(both)[HEAD])


def test_numeric_finds_a_tied_head_that_is_not_the_embeddings(
    base: Path, tmp_path: Path, out: Path
) -> None:
    adapter = make_adapter(tmp_path / "adapter", base, target_modules=["q_proj"])
    both = with_head(base, tmp_path / "both", last_value)
    merge(make_plan(base, [adapter]), out)

    report = verify(out, "numeric", base=locate(both), adapters=[(adapter, 1.0)])

    told = "the base ties it to the embeddings, and stores other values of it"
    assert told in [finding.what for finding in report.findings]

"""LoRA on an untied lm_head, where PEFT saves a copy of the base weight beside the factors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models import assert_same_tensors, make_adapter, make_base, oracle, read_tensors
from safetensors.torch import load_file, save_file

from merge_core.errors import InputError
from merge_core.merge import merge
from merge_core.planner import make_plan
from merge_core.verify import verify

COPY = "base_model.model.lm_head.base_layer.weight"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_base(tmp_path / "base")


@pytest.fixture(params=[True, False], ids=["safetensors", "bin"])
def adapter(request: pytest.FixtureRequest, tmp_path: Path, base: Path) -> Path:
    path = tmp_path / "adapter"
    return make_adapter(path, base, target_modules=["q_proj", "lm_head"], safe=request.param)


def test_lora_on_an_untied_lm_head_is_merged_as_peft_does(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    merge(make_plan(base, [adapter]), tmp_path / "out")

    assert_same_tensors(read_tensors(tmp_path / "out"), oracle(base, adapter))
    assert verify(tmp_path / "out", "numeric").findings == ()


def test_a_copy_in_another_dtype_is_compared_by_value(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    _change_copy(adapter, lambda tensor: tensor.float())

    merge(make_plan(base, [adapter]), tmp_path / "out")

    assert verify(tmp_path / "out", "numeric").findings == ()


def test_a_copy_that_was_trained_takes_the_place_of_the_base_s(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    def train(tensor: torch.Tensor) -> torch.Tensor:
        tensor[-1, -1] += 1
        return tensor

    _change_copy(adapter, train)

    merge(make_plan(base, [adapter]), tmp_path / "out")

    assert_same_tensors(read_tensors(tmp_path / "out"), oracle(base, adapter))


def test_without_a_copy_the_base_s_own_is_used(base: Path, adapter: Path, tmp_path: Path) -> None:
    wanted = oracle(base, adapter)
    _change_copy(adapter, lambda _: None)

    merge(make_plan(base, [adapter]), tmp_path / "out")

    assert_same_tensors(read_tensors(tmp_path / "out"), wanted)


def test_a_copy_of_more_tokens_without_embeddings_of_as_many_is_refused(
    base: Path, adapter: Path
) -> None:
    _change_copy(adapter, lambda tensor: torch.cat([tensor, tensor[:1]]))

    with pytest.raises(InputError, match=r"resized at one end only: .*161"):
        make_plan(base, [adapter])


def _change_copy(adapter: Path, change) -> None:
    pickle, safe = adapter / "adapter_model.bin", adapter / "adapter_model.safetensors"
    state = torch.load(pickle, weights_only=True) if pickle.exists() else load_file(safe)
    changed = change(state.pop(COPY).clone())
    state |= {} if changed is None else {COPY: changed.contiguous()}
    if pickle.exists():
        torch.save(state, pickle)
    else:
        save_file(state, safe)

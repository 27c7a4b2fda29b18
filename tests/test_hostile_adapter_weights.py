"""Factors that make no delta, keys of other methods and damaged files are refused by name."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from handmade import Geometry, random_factors, write_adapter
from models import edit_json
from safetensors.torch import load_file, save_file
from scenes import DOWN, QA, QB, AdapterScene, Q


def test_an_adapter_for_another_size_is_refused(adapter_scene: AdapterScene) -> None:
    adapter_scene.keep(**{QA: torch.ones(4, 64), QB: torch.ones(64, 4)})
    said = f"module {Q}: the delta is [64, 64], the base tensor [32, 32]"
    assert said in adapter_scene.refusal()


def test_layers_that_the_base_lacks_are_refused(adapter_scene: AdapterScene) -> None:
    deep = Geometry(layers=6)
    ranks = {f"model.layers.{n}.self_attn.q_proj": 4 for n in range(6)}
    write_adapter(adapter_scene.adapter, random_factors(deep.linear, ranks), r=4, lora_alpha=8)
    names = ", ".join(f"model.layers.{n}.self_attn.q_proj.weight" for n in (1, 2, 3))
    assert f"the base has no {names} and 2 more" in adapter_scene.refusal()


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({QB: None}, f"module {Q}: has lora_A but no lora_B"),
        ({QA: None}, f"module {Q}: has lora_B but no lora_A"),
        (
            {QA: torch.ones(2, 32), QB: torch.ones(32, 2)},
            "lora_A has rank 2, lora_B 2, the config says 4",
        ),
        ({QB: torch.ones(32, 2)}, "lora_A has rank 4, lora_B 2, the config says 4"),
        ({QA: torch.ones(4)}, f"{QA} has shape [4], not two sizes above 0"),
        ({QA: torch.ones(0, 32)}, f"{QA} has shape [0, 32], not two sizes above 0"),
        ({QA: torch.ones(4, 32).to(torch.float64)}, f"{QA} is F64, not F32, F16 or BF16"),
        ({"what.is.this": torch.ones(1)}, "key 'what.is.this' is not known"),
        (
            {"model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(4, 32)},
            "is not known, and nothing is dropped silently",
        ),
    ],
)
def test_factors_that_make_no_delta_are_refused(
    adapter_scene: AdapterScene, tensors: dict[str, torch.Tensor | None], said: str
) -> None:
    adapter_scene.keep(**tensors)
    assert said in adapter_scene.refusal()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_factor_that_is_not_finite_is_refused_with_its_row(
    adapter_scene: AdapterScene, dtype: torch.dtype, value: float
) -> None:
    factor = torch.full((32, 4), torch.finfo(dtype).max, dtype=dtype)
    factor[17, 2] = value
    adapter_scene.keep(**{QB: factor})
    assert f"tensor {QB!r}: holds NaN or infinity in row 17" in adapter_scene.refusal()


def test_a_square_tensor_of_an_unknown_model_with_the_flag_is_refused(
    adapter_scene: AdapterScene,
) -> None:
    edit_json(adapter_scene.base / "config.json", model_type="llama")
    adapter_scene.configure(fan_in_fan_out=True)
    adapter_scene.keep(**{f"base_model.model.{DOWN}.lora_{x}.weight": None for x in "AB"})

    text = adapter_scene.refusal()
    assert "nothing tells which way a square tensor of 'llama' lies" in text
    assert Q in text


def test_an_empty_adapter_is_refused(adapter_scene: AdapterScene) -> None:
    save_file({}, adapter_scene.adapter / "adapter_model.safetensors")
    assert "the adapter is empty: it holds no tensor" in adapter_scene.refusal()
    (adapter_scene.adapter / "adapter_model.safetensors").unlink()
    assert "has neither adapter_model.safetensors nor adapter_model.bin" in adapter_scene.refusal()


class Payload:
    """Makes a directory when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(
    adapter_scene: AdapterScene, tmp_path: Path, zipped: bool
) -> None:
    (adapter_scene.adapter / "adapter_model.safetensors").unlink()
    file, ran = adapter_scene.adapter / "adapter_model.bin", tmp_path / "ran"
    if zipped:
        torch.save({QA: torch.ones(4, 32), QB: Payload(ran)}, file)
    else:
        file.write_bytes(pickle.dumps(Payload(ran)))
    assert "adapter_model.bin: cannot be loaded with weights_only" in adapter_scene.refusal()
    assert not ran.exists()


def test_tensors_without_data_are_refused(adapter_scene: AdapterScene) -> None:
    """Saved from a model of which device_map had left a part on the meta device."""
    tensors = load_file(adapter_scene.adapter / "adapter_model.safetensors")
    (adapter_scene.adapter / "adapter_model.safetensors").unlink()
    tensors[QA] = tensors[QA].to("meta")
    torch.save(tensors, adapter_scene.adapter / "adapter_model.bin")

    assert f"holds no data for {QA}: saved from the meta device" in adapter_scene.refusal()


def test_a_damaged_pickle_is_refused(adapter_scene: AdapterScene) -> None:
    state = load_file(adapter_scene.adapter / "adapter_model.safetensors")
    (adapter_scene.adapter / "adapter_model.safetensors").unlink()
    file = adapter_scene.adapter / "adapter_model.bin"
    torch.save(state, file)
    content = file.read_bytes()
    for size in (len(content) - 1, len(content) // 2, 10, 0):
        file.write_bytes(content[:size])
        assert "adapter_model.bin: cannot be loaded with weights_only" in adapter_scene.refusal()
    for other in ([1, 2], {**state, 7: torch.ones(1)}, {**state, QA: 1.0}, torch.ones(1)):
        torch.save(other, file)
        assert "adapter_model.bin: holds " in adapter_scene.refusal()

"""Nothing in an adapter is overlooked, and nothing but what it names is changed.

``base_layer.weight`` beside factors is the one tensor that may be missing: PEFT leaves it out when
it is told to, and then the base's own is meant.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import make_adapter, read_tensors
from peft import BdLoraConfig, TrainableTokensConfig
from safetensors.torch import load_file, save_file
from test_grammar import BIT_BY_BIT

from merge_core.errors import InputError
from merge_core.merge import merge
from merge_core.planner import make_plan

KINDS: dict[str, dict[str, Any]] = {
    **BIT_BY_BIT,
    "embeddings": {"target_modules": ["embed_tokens"]},
    "DoRA on embeddings": {"target_modules": ["embed_tokens"], "use_dora": True},
    "BD-LoRA": {
        "target_modules": ["q_proj", "o_proj"],
        "use_bdlora": BdLoraConfig(["o_proj"], ["q_proj"], nblocks=2),
    },
    "a parameter": {"target_modules": ["q_proj"], "target_parameters": ["o_proj.weight"]},
    "the tuner of trained tokens": {
        "config": TrainableTokensConfig(token_indices=[2, 159], target_modules=["embed_tokens"])
    },
    "a vocabulary of more tokens": {"vocabulary": 170, "target_modules": ["q_proj"]},
}
PREFIX = "base_model.model."
OPTIONAL = re.compile(r"\.base_layer\.weight")
ENDS = re.compile(
    r"(\.token_adapter)?(\.base_layer)?\.(lora_[A-Z]|lora_emb|lora_mag|train|weight|bias)"
)


@pytest.fixture(scope="module", params=KINDS)
def adapter(
    request: pytest.FixtureRequest, base: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    return make_adapter(tmp_path_factory.mktemp("kind") / "adapter", base, **KINDS[request.param])


def module_of(key: str) -> str:
    return ENDS.split(key.removeprefix(PREFIX))[0]


def one_of_each(saved: dict[str, torch.Tensor]) -> list[str]:
    """The first key of each kind, whatever the layer."""
    first: dict[str, str] = {}
    for key in sorted(saved):
        first.setdefault(re.sub(r"\d+", "N", key), key)
    return list(first.values())


def refusals(
    base: Path, adapter: Path, path: Path, change: Callable[[dict[str, torch.Tensor], str], None]
) -> list[str]:
    """For each kind of key whether the plan is refused once it is changed: those that are not."""
    shutil.copytree(adapter, path)
    file = path / "adapter_model.safetensors"
    saved, passed = load_file(file), []
    for key in one_of_each(saved):
        changed = dict(saved)
        change(changed, key)
        save_file(changed, file)
        said = refusal(base, path)
        if said is None:
            passed.append(key)
            continue
        module = module_of(key)
        named = (module, module.rpartition(".")[2], "the embeddings", "the adapter is empty")
        assert any(name in said for name in named), (key, said)
    return passed


def refusal(base: Path, adapter: Path) -> str | None:
    try:
        make_plan(base, [adapter])
    except InputError as error:
        return str(error)
    return None


def test_a_missing_tensor_is_named(base: Path, adapter: Path, tmp_path: Path) -> None:
    passed = refusals(base, adapter, tmp_path / "changed", lambda saved, key: saved.pop(key))

    assert [key for key in passed if not OPTIONAL.search(key)] == []


@pytest.mark.parametrize(
    "beside",
    [
        {"modules_to_save": ["lm_head"]},
        {"trainable_token_indices": [1, 5]},
        {"bias": "all"},
    ],
    ids=str,
)
def test_factors_that_are_lost_altogether_are_named(
    base: Path, beside: dict[str, Any], tmp_path: Path
) -> None:
    adapter = make_adapter(tmp_path / "adapter", base, target_modules=["o_proj"], **beside)
    file = adapter / "adapter_model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if ".lora_" not in k}, file)

    said = refusal(base, adapter)

    assert said is not None
    assert "target_modules covers" in said
    assert "o_proj, for which the file holds nothing" in said


def test_a_file_of_tensors_that_only_steered_the_training_is_refused(
    base: Path, tmp_path: Path
) -> None:
    adapter = make_adapter(tmp_path / "adapter", base)
    module = f"{PREFIX}model.layers.0.self_attn.q_proj"
    file = adapter / "adapter_model.safetensors"
    save_file({f"{module}.lora_velora_embed_A": torch.ones(4)}, file)

    assert "the file holds nothing that a merge uses" in str(refusal(base, adapter))


@pytest.mark.parametrize(("old", "new"), [("$", ".x"), ("layers.0", "layers.7"), ("model", "mode")])
def test_a_renamed_tensor_is_named(
    base: Path, adapter: Path, old: str, new: str, tmp_path: Path
) -> None:
    def rename(saved: dict[str, torch.Tensor], key: str) -> None:
        saved[re.sub(old, new, key, count=1)] = saved.pop(key)

    passed = refusals(base, adapter, tmp_path / "changed", rename)

    assert [key for key in passed if "layers.0" in key or old != "layers.0"] == []


@pytest.mark.parametrize("dim", [0, -1])
def test_a_tensor_of_another_shape_is_named(
    base: Path, adapter: Path, dim: int, tmp_path: Path
) -> None:
    def grow(saved: dict[str, torch.Tensor], key: str) -> None:
        tensor = saved[key]
        saved[key] = torch.cat([tensor, tensor.narrow(dim, 0, 1)], dim)

    assert refusals(base, adapter, tmp_path / "changed", grow) == []


def test_only_what_the_adapter_names_is_changed(
    base: Path, adapter: Path, tmp_path: Path, out: Path
) -> None:
    saved = load_file(adapter / "adapter_model.safetensors")
    named = set()
    for key in saved:
        part = "bias" if key.endswith("bias") else "weight"
        named.add(f"{module_of(key)}.{part}")

    merge(make_plan(base, [adapter]), out)

    before, after = read_tensors(base), read_tensors(out)
    assert before.keys() == after.keys()
    changed = {name for name in before if not same(before[name], after[name])}
    assert changed <= named
    # Copies of what was not trained are in the file as well.
    assert changed >= named - {"lm_head.weight", "model.embed_tokens.weight"}


def same(one: torch.Tensor, two: torch.Tensor) -> bool:
    return one.shape == two.shape and torch.equal(one.view(torch.int16), two.view(torch.int16))

"""Of an adapter of another tuner nothing is overlooked: what is lost, renamed or misshapen."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from models import read_tensors
from safetensors.torch import load_file, save_file
from tuners import CONFIGS

from merge_core.errors import InputError
from merge_core.merge import merge
from merge_core.planner import make_plan

SHAPES_THAT_PEFT_CHECKS = {
    ("ADAMSS", "adamss_A"),
    ("ADAMSS", "adamss_B"),
    ("BOFT", "boft_R"),
    ("LOKR", "lokr_w2_a"),
}
"""By formulae of the config that the plan does not know: found when the layer is merged."""

Change = Callable[[dict[str, torch.Tensor], str], None]


def changed(adapter: Path, path: Path, change: Change) -> Iterator[tuple[str, Path]]:
    """The adapter with one tensor of each kind changed, one after another."""
    shutil.copytree(adapter, path)
    saved = load_file(adapter / "adapter_model.safetensors")
    kinds: dict[str, str] = {}
    for key in sorted(saved):
        kinds.setdefault(re.sub(r"\d+|[a-z]+_proj", "N", key), key)
    for key in kinds.values():
        tensors = dict(saved)
        change(tensors, key)
        save_file(tensors, path / "adapter_model.safetensors")
        yield key, path


def refusal(base: Path, adapter: Path, out: Path | None = None) -> str | None:
    try:
        plan = make_plan(base, [adapter])
        if out is not None:
            merge(plan, out, device="cpu")
    except InputError as error:
        return str(error)
    return None


def names(said: str | None, key: str) -> bool:
    """Whether a refusal names the tensor, or the module that lacks it."""
    last = key.removeprefix("base_model.").removeprefix("model.")
    module = re.sub(r"(_proj|norm)\..*", r"\1", last)
    return said is not None and (last in said or module in said)


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_tensor_that_is_lost_or_renamed_is_named(
    kind: str, tuned: Callable[..., Path], base: Path, tmp_path: Path
) -> None:
    def rename(saved: dict[str, torch.Tensor], key: str) -> None:
        saved[f"{key}x"] = saved.pop(key)

    def move(saved: dict[str, torch.Tensor], key: str) -> None:
        saved[key.replace("layers.0", "layers.7").replace("model.norm", "model.n")] = saved.pop(key)

    def lose(saved: dict[str, torch.Tensor], key: str) -> None:
        del saved[key]

    for change in (rename, move, lose):
        for key, path in changed(tuned(kind), tmp_path / change.__name__, change):
            shared = "model.model" not in key
            if not (shared and change is move):
                said = refusal(base, path)
                nothing_left = said is not None and "the adapter is empty" in said
                assert names(said, key) or nothing_left, (key, said)


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("dim", [0, -1])
def test_a_tensor_of_another_shape_is_named(
    kind: str, dim: int, tuned: Callable[..., Path], base: Path, tmp_path: Path
) -> None:
    def grow(saved: dict[str, torch.Tensor], key: str) -> None:
        tensor = saved[key]
        saved[key] = torch.cat([tensor, tensor.narrow(dim, 0, 1)], dim)

    for key, path in changed(tuned(kind), tmp_path / "changed", grow):
        said = refusal(base, path)
        if said is None:
            part = key.removesuffix(".0").rpartition(".")[2]
            assert (kind, part) in SHAPES_THAT_PEFT_CHECKS or "weight" in key, key
            said = refusal(base, path, tmp_path / "out")
            shutil.rmtree(tmp_path / "out")
        assert names(said, key), (key, said)


@pytest.mark.parametrize("kind", CONFIGS)
def test_only_what_the_adapter_names_is_changed(
    kind: str, tuned: Callable[..., Path], base: Path, tmp_path: Path
) -> None:
    layers = {"LN_TUNING": ("norm",), "BEFT": ("q_proj", "v_proj")}
    ends = layers.get(kind, ("q_proj", "o_proj", "up_proj", "down_proj"))

    merge(make_plan(base, [tuned(kind)], shard_bytes=50_000), tmp_path / "out", device="cpu")

    before, after = read_tensors(base), read_tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        module, _, part = name.rpartition(".")
        same = torch.equal(tensor.view(torch.int16), after[name].view(torch.int16))
        meant = module.endswith(ends) and "post_" not in module
        assert meant or same, name
        assert not same or not meant or part == "bias" or kind == "BEFT", name

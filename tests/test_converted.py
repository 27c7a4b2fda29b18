"""Adapters whose initialisation changed the base: merged once PEFT has converted them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from models import ALL_LINEAR, assert_same_tensors, oracle, read_tensors
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from merge_core.errors import InputError
from merge_core.merge import merge
from merge_core.planner import make_plan
from merge_core.verify import verify


@pytest.mark.filterwarnings("ignore:(PiSSA|OLoRA) changes the base weights of the model")
@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
def test_a_converted_adapter_makes_of_the_base_what_was_trained(
    init: str, bases: Callable[..., Path], tmp_path: Path, out: Path
) -> None:
    base = bases("F32", shard="80KB")
    converted, plain, answers = train(base, init, tmp_path)

    merge(make_plan(base, [converted]), out)

    assert_same_tensors(read_tensors(out), oracle(base, converted))
    assert verify(out, "numeric").findings == ()
    assert torch.allclose(logits(AutoModelForCausalLM.from_pretrained(out)), answers, atol=1e-4)
    with pytest.raises(InputError, match="path_initial_model_for_weight_conversion"):
        make_plan(base, [plain])


def train(base: Path, init: str, path: Path) -> tuple[Path, Path, torch.Tensor]:
    """The adapter converted, as it is, and what the model answers with it."""
    torch.manual_seed(3)
    fields = {"r": 4, "lora_alpha": 6, "target_modules": ALL_LINEAR, "init_lora_weights": init}
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), LoraConfig(task_type="CAUSAL_LM", **fields)
    )
    model.peft_config["default"].init_lora_weights = True  # as PEFT asks for, to save the start
    model.save_pretrained(path / "start")
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.add_(torch.randn_like(parameter), alpha=0.02)
    model.peft_config["default"].init_lora_weights = init
    model.save_pretrained(path / "plain")
    start = str(path / "start")
    model.save_pretrained(path / "converted", path_initial_model_for_weight_conversion=start)
    return path / "converted", path / "plain", logits(model)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        answer: torch.Tensor = model(torch.arange(2, 40)[None]).logits
        return answer

"""Ways to start a training: those that changed the base are merged once PEFT has converted them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import ALL_LINEAR, assert_same_tensors, edit_json, make_adapter, oracle, read_tensors
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.config import CordaConfig, LoraGAConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.loraga import preprocess_loraga
from transformers import AutoModelForCausalLM

from merge_core.errors import InputError
from merge_core.merge import merge
from merge_core.planner import make_plan
from merge_core.verify import verify


@pytest.mark.filterwarnings(
    "ignore:(PiSSA|OLoRA|CorDA|LoRA-GA) (changes|modifies) the base weights"
)
@pytest.mark.filterwarnings("ignore:`(corda|lora_ga)_config` specified but will be ignored")
@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "corda", "lora_ga"])
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
    loaded = AutoModelForCausalLM.from_pretrained(base)
    model = get_peft_model(loaded, start_config(loaded, init))
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


def start_config(model: Any, init: str) -> LoraConfig:
    """PEFT's config; what it takes from data is left at the modules of ``model``."""
    fields: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": ALL_LINEAR}
    if init == "corda":
        fields["corda_config"] = CordaConfig(corda_method="ipm")
    if init == "lora_ga":
        fields["lora_ga_config"] = LoraGAConfig()
    config = LoraConfig(task_type="CAUSAL_LM", init_lora_weights=init, **fields)
    if init == "corda":
        preprocess_corda(model, config, run_model=lambda: logits(model))
    if init == "lora_ga":
        tokens = torch.arange(2, 40)[None]

        def step() -> None:
            model(tokens, labels=tokens).loss.backward()

        preprocess_loraga(model, config, step)
    return config


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        answer: torch.Tensor = model(torch.arange(2, 40)[None]).logits
        return answer


@pytest.mark.filterwarnings("ignore:`init_lora_weights` is 'eva' but `eva_config`")
@pytest.mark.filterwarnings("ignore:lora with eva initialization used with")
@pytest.mark.parametrize("init", ["gaussian", "orthogonal", "mica", "eva"])
def test_starts_that_leave_the_base_alone_merge_as_plain_factors(
    init: str, bases: Callable[..., Path], tmp_path: Path, out: Path
) -> None:
    base = bases("F32", shard="80KB")
    adapter = make_adapter(tmp_path / "adapter", base, init_lora_weights=init)

    merge(make_plan(base, [adapter]), out)

    assert_same_tensors(read_tensors(out), oracle(base, adapter))
    assert verify(out, "numeric").findings == ()


def test_an_adapter_of_loftq_is_refused_with_the_base_that_it_belongs_to(
    base: Path, adapter_copy: Path
) -> None:
    edit_json(adapter_copy / "adapter_config.json", init_lora_weights="loftq")

    with pytest.raises(
        InputError, match="Give the base that LoftQ wrote, and set init_lora_weights"
    ):
        make_plan(base, [adapter_copy])

"""A run of transformers' own Trainer on a LoRA of PEFT, and what is made of what it leaves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import trainers
from models import assert_same_tensors, make_base, oracle, read_tensors
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from cluster.demo import _byte_tokenizer
from merge_core.merge import merge
from merge_core.planner import make_plan

NEW = "<|tool|>"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its embeddings have more rows than there are tokens, as those of Qwen1.5."""
    path = make_base(tmp_path_factory.mktemp("run") / "Qwen1.5-7B", vocab_size=264)
    _byte_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def output(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of two steps, each of which is kept, with a tokenizer that got a token more."""
    path = tmp_path_factory.mktemp("run") / "output"
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens([NEW], special_tokens=True)
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "down_proj"])
    ids = tokenizer(f"one {NEW} two")["input_ids"]
    run = Trainer(
        model=get_peft_model(model, lora),
        args=TrainingArguments(
            output_dir=str(path),
            max_steps=2,
            save_steps=1,
            learning_rate=1e-2,
            per_device_train_batch_size=1,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=[{"input_ids": ids, "labels": ids}] * 2,
        processing_class=tokenizer,
    )
    run.train()
    run.save_model()
    return path


def test_its_layout_is_the_one_that_the_other_tests_write(output: Path, tmp_path: Path) -> None:
    def names(folder: Path) -> set[str]:
        found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
        return {name.replace("checkpoint-5/", "checkpoint-1/") for name in found}

    written = names(trainers.trainer(tmp_path / "output"))
    assert {name for name in written if "checkpoint-10" not in name} - names(output) == set()


@pytest.mark.parametrize("name", [None, "checkpoint-1"])
def test_what_it_leaves_is_merged_with_its_tokenizer(
    base: Path, output: Path, tmp_path: Path, name: str | None
) -> None:
    plan = make_plan(base, [output], adapter_name=name)
    merge(plan, tmp_path / "out", device="cpu", level="load")

    adapter = output / name if name else output
    assert plan.adapters[0].path.local == adapter
    assert_same_tensors(read_tensors(tmp_path / "out"), oracle(base, adapter))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer(NEW)["input_ids"] == [257]
    assert tokenizer.chat_template.startswith("{% for message")
    assert any(f"1 token more: '{NEW}'" in note for note in plan.notes)

"""``raymeld demo``: the whole way on a small model of the real architecture, in a minute.

Nothing is downloaded: the checkpoint is made with transformers, the adapter is trained with PEFT
until it knows three answers, and the merged checkpoint must give the same answers as base and
adapter together.
"""

from __future__ import annotations

import logging
import shlex
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

from rich.console import Console

from merge_core.errors import RaymeldError, VerificationError, refuse

LESSONS = {
    "Where does the night train go? ": "It goes to the sea.",
    "What does a shard hold? ": "A few layers of the model.",
    "Who keeps the ledger? ": "The collector keeps it.",
}
STEPS = 120
"""Of full-batch training: more than enough to learn three answers by heart."""


def run_demo(directory: Path) -> None:
    """Make, train, merge, verify and compare in ``directory``, which must not exist.

    Raises:
        InputError: the directory exists.
        RaymeldError: the merge failed.
        VerificationError: the merged model answers differently.
    """
    if directory.exists():
        raise refuse("exists already", str(directory), "Remove it, or name another directory")
    console = Console(highlight=False)
    base, adapter, out = (directory / name for name in ("base", "adapter", "merged"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers and PEFT deprecate things between them
        _only_our_words()
        console.print("[bold]1. a small Qwen1.5 checkpoint[/], untrained, in bfloat16")
        make_base(base)
        console.print(f"   {base}: {len([*base.glob('*.safetensors')])} files of weights")
        console.print(f"[bold]2. a LoRA adapter[/], trained with PEFT for {STEPS} steps")
        first, last = train_adapter(base, adapter)
        console.print(f"   loss {first:.2f} -> {last:.4f}")
        console.print("[bold]3. the merge[/], on a Ray started for it")
        _raymeld("merge", base, adapter, "--out", out, "--verify", "load")
        console.print("[bold]4. once more, against base and adapter in float64[/]")
        _raymeld("verify", out, "--level", "numeric")
        console.print("[bold]5. the answers[/]")
        _compare(console, base, adapter, out)
    console.print(f"[bold green]done[/]: the merged checkpoint is in {out}")


def make_base(path: Path) -> None:
    """Save an untrained Qwen2ForCausalLM with its tokenizer: QKV bias, untied head, an index."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    tokenizer = _byte_tokenizer()
    torch.manual_seed(0)
    config = Qwen2Config(
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=len(tokenizer),
        max_position_embeddings=512,
        tie_word_embeddings=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen2ForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(path, max_shard_size="2MB")
    tokenizer.save_pretrained(path)


def train_adapter(base: Path, path: Path) -> tuple[float, float]:
    """Train a LoRA on LESSONS and save it; returns the first and the last loss."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    lora = LoraConfig(
        task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear", lora_dropout=0.0
    )
    model = get_peft_model(model, lora)
    batch = tokenizer(
        [question + answer + tokenizer.eos_token for question, answer in LESSONS.items()],
        return_tensors="pt",
        padding=True,
    )
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    for row, question in zip(labels, LESSONS, strict=True):
        row[: len(tokenizer(question)["input_ids"])] = -100  # only the answers are learnt
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(STEPS):
        loss = model(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.save_pretrained(path)
    return losses[0], losses[-1]


def answers(model: Any, tokenizer: Any) -> list[str]:
    """What the model says to each question of LESSONS, greedily."""
    said = []
    for question in LESSONS:
        asked = tokenizer(question, return_tensors="pt")
        tokens = model.generate(**asked, max_new_tokens=40, do_sample=False)
        text = tokenizer.decode(tokens[0, asked["input_ids"].shape[1] :], skip_special_tokens=True)
        said.append(text)
    return said


def _compare(console: Console, base: Path, adapter: Path, out: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(out)
    untouched = answers(AutoModelForCausalLM.from_pretrained(base), tokenizer)
    together = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    wanted = answers(together, tokenizer)
    merged = answers(AutoModelForCausalLM.from_pretrained(out), tokenizer)
    for question, *said in zip(LESSONS, untouched, wanted, merged, strict=True):
        console.print(f"   {question.strip()}", markup=False)
        for who, text in zip(("base", "base + adapter", "merged"), said, strict=True):
            console.print(f"     {who:14} {text!r}", markup=False)
    if merged != wanted:
        raise VerificationError(
            "the merged model answers differently from base and adapter", str(out)
        )


def _only_our_words() -> None:
    """No bars of transformers, and no word of bitsandbytes, which PEFT imports where it is there,
    about kernels that it misses.
    """
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def _byte_tokenizer() -> Any:
    """A tokenizer of single bytes, so that nothing has to be downloaded."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: number for number, symbol in enumerate(["<|endoftext|>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def _raymeld(*arguments: object) -> None:
    words = [str(argument) for argument in arguments]
    print(f"   $ raymeld {shlex.join(words)}", flush=True)
    done = subprocess.run([sys.executable, "-P", "-m", "cluster.cli", *words], check=False)
    if done.returncode:
        raise RaymeldError(f"raymeld {words[0]} ended with exit code {done.returncode}")

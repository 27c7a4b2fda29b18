"""Output directories as trainers leave them, of adapters that are written by hand.

``trainer`` is held to a run of the installed Trainer (``test_trainer_run``). The other names are
those in the sources of tools that were not run for this:

- axolotl: ``src/axolotl/train.py`` (``save_initial_configs`` runs before the training);
- ms-swift 3: ``swift/trainers/mixin.py`` (``_save``: no tokenizer beside an adapter;
  ``_save_initial_model``, ``_save_converted_model``), ``swift/tuners/peft.py``
  (additional_config.json), ``examples/train/multimodal/lora_llm_full_vit/custom_plugin.py``
  (vit.safetensors);
- LLaMA-Factory: ``src/llamafactory/extras/constants.py`` and ``ploting.py``,
  ``train/callbacks.py`` (value heads, ``PissaConvertCallback``), ``train/sft/workflow.py``;
- unsloth: ``unsloth/models/mapper.py`` has the names of its packed bases; adapter and tokenizer are
  saved by PEFT and transformers;
- ms-swift 1 and 2: ``swift/tuners/base.py`` (``SwiftModel.save_pretrained``: each adapter in a
  folder of its name, ``configuration.json`` above).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from handmade import Geometry, random_factors, write_adapter

SMALL = Geometry(layers=1)


def adapter_at(path: Path, seed: int = 1, **fields: Any) -> Path:
    """What PEFT saves: config, weights, and a card."""
    factors = random_factors(SMALL.linear, dict.fromkeys(SMALL.linear, 4), seed=seed)
    write_adapter(path, factors, r=4, lora_alpha=8, **fields)
    (path / "README.md").write_text("---\nlibrary_name: peft\n---\n")
    return path


def tokenizer_at(path: Path, added: tuple[str, ...] = (), first: int = 70) -> Path:
    """What ``save_pretrained`` of a fast tokenizer leaves, with ``added`` tokens."""
    path.mkdir(parents=True, exist_ok=True)
    vocabulary = {f"t{n}": n for n in range(first)}
    tokens = [{"id": first + n, "content": text, "special": True} for n, text in enumerate(added)]
    model = {"type": "BPE", "vocab": vocabulary, "merges": []}
    content = {"version": "1.0", "added_tokens": tokens, "model": model}
    (path / "tokenizer.json").write_text(json.dumps(content))
    (path / "tokenizer_config.json").write_text('{"tokenizer_class": "Qwen2Tokenizer"}')
    (path / "chat_template.jinja").write_text(f"{{{{ messages }}}}{''.join(added)}")
    return path


def checkpoint_at(path: Path, seed: int = 1, **fields: Any) -> Path:
    """A Trainer's checkpoint: an adapter beside the state of the training."""
    adapter_at(path, seed, **fields)
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
        (path / name).write_bytes(b"a pickle that nobody may load")
    (path / "trainer_state.json").write_text("{}")
    return path


def trainer(path: Path, **fields: Any) -> Path:
    """Of transformers' Trainer: checkpoints, and the final adapter."""
    for step in (5, 10):
        checkpoint_at(path / f"checkpoint-{step}", seed=step, **fields)
    adapter_at(path, **fields)
    (path / "training_args.bin").write_bytes(b"a pickle")
    return tokenizer_at(path)


def llama_factory(path: Path, **fields: Any) -> Path:
    trainer(path, **fields)
    for name in ("all_results.json", "train_results.json", "trainer_state.json"):
        (path / name).write_text("{}")
    for name in ("trainer_log.jsonl", "running_log.txt", "llamaboard_config.yaml"):
        (path / name).write_text("")
    (path / "training_loss.png").write_bytes(b"PNG")
    for name in ("added_tokens.json", "special_tokens_map.json"):
        (path / name).write_text("{}")
    return path


def llama_factory_pissa(path: Path) -> Path:
    """Of ``pissa_convert: true``: the adapter itself is not converted, and the start claims to be
    plain."""
    llama_factory(path, init_lora_weights="pissa_niter_16")
    for seed, name in enumerate(("pissa_init", "pissa_backup", "pissa_converted")):
        adapter_at(path / name, seed, init_lora_weights=True)
    return path


def axolotl(path: Path, *, ended: bool, **fields: Any) -> Path:
    """It saves the configs of adapter, tokenizer and model first, and the weights at the end."""
    adapter_at(path, **fields)
    tokenizer_at(path)
    (path / "config.json").write_text(json.dumps(SMALL.config))
    for step in (8, 16):
        tokenizer_at(checkpoint_at(path / f"checkpoint-{step}", seed=step, **fields))
    if not ended:
        (path / "adapter_model.safetensors").unlink()
    return path


def swift(path: Path, **fields: Any) -> Path:
    """ms-swift 3: runs below the output directory, and nothing but checkpoints in them."""
    run = path / "v0-20240601-101010"
    for step in (20, 100):
        checkpoint = checkpoint_at(run / f"checkpoint-{step}", seed=step, **fields)
        (checkpoint / "args.json").write_text('{"model": "Qwen/Qwen1.5-7B"}')
        (checkpoint / "additional_config.json").write_text('{"lora_dtype": null}')
    (run / "images").mkdir()
    (run / "logging.jsonl").write_text("")
    (run / "args.json").write_text("{}")
    return run


def swift_pissa(path: Path) -> Path:
    """The start lies in the run, what was converted in each checkpoint."""
    run = swift(path, init_lora_weights="pissa")
    adapter_at(run / "initial_model", init_lora_weights=True)
    for step in (20, 100):
        adapter_at(run / f"checkpoint-{step}" / "converted" / "default", seed=step)
    return run


def swift_2(path: Path, **fields: Any) -> Path:
    """A checkpoint of ms-swift 1 and 2: each adapter under its name, ``default`` as well."""
    adapter_at(path / "default", **fields)
    (path / "configuration.json").write_text('{"adapter_cfg": {}}')
    return path


def unsloth(path: Path, **fields: Any) -> Path:
    base = "unsloth/Qwen1.5-7B-Chat-bnb-4bit"
    adapter_at(path, base_model_name_or_path=base, **fields)
    return tokenizer_at(path)

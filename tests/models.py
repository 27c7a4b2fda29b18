"""Small real checkpoints and adapters, made with transformers and PEFT, and PEFT as the oracle."""

from __future__ import annotations

import copy
import json
import math
import shutil
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from oracles import Delta
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.utils.other import get_pattern_key
from peft.utils.save_and_load import load_peft_weights
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

HIDDEN, INNER, VOCAB, LAYERS = 64, 96, 160, 2
ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
Saved = dict[str, torch.Tensor]


_NO_MATRIX = r"Adapter 'default': .* LoRA tensor\(s\) have invalid shape"
"""PEFT 0.21 takes the vector of lora_bias for a matrix that was not gathered."""


def qwen_config(**changes: Any) -> Qwen2Config:
    fields: dict[str, Any] = {
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCAB,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
    }
    return Qwen2Config(**{**fields, **changes})


def make_base(
    path: Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    shard: str = "50GB",
    seed: int = 0,
    **config: Any,
) -> Path:
    """A Qwen1.5 checkpoint with random weights, biases included."""
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(qwen_config(**config)).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    model.save_pretrained(path, max_shard_size=shard)
    return _with_side_files(path)


def make_gpt2(path: Path, dtype: torch.dtype, width: int = 96) -> Path:
    """A checkpoint whose layers store [in, out]: Conv1D instead of nn.Linear."""
    torch.manual_seed(0)
    config = GPT2Config(n_embd=width, n_layer=2, n_head=2, vocab_size=120, n_positions=32)
    GPT2LMHeadModel(config).to(dtype).save_pretrained(path)
    return _with_side_files(path)


def _with_side_files(path: Path) -> Path:
    (path / "tokenizer.json").write_text('{"version": "1.0"}')
    (path / "tokenizer_config.json").write_text("{}")
    (path / "chat_template.jinja").write_text("{{ messages }}")
    (path / "LICENSE").write_text("terms")
    (path / "README.md").write_text("# the base's own card")
    return path


def make_adapter(
    path: Path,
    base: Path,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 1,
    scale: float = 0.1,
    safe: bool = True,
    vocabulary: int | None = None,
    config: PeftConfig | None = None,
    **lora: Any,
) -> Path:
    """An adapter saved by PEFT, LoRA unless ``config`` says otherwise, every parameter randomised.

    ``vocabulary`` is what the base was resized to for the training.
    """
    model = AutoModelForCausalLM.from_pretrained(base)
    if vocabulary is not None:
        model.resize_token_embeddings(vocabulary, mean_resizing=False)
    fields: dict[str, Any] = {"r": 8, "lora_alpha": 16, "target_modules": ALL_LINEAR}
    given = copy.deepcopy(config)  # PEFT writes the base's path into it
    peft = get_peft_model(model, given or LoraConfig(task_type="CAUSAL_LM", **{**fields, **lora}))
    torch.manual_seed(seed)
    for name, parameter in peft.named_parameters():
        if "lora_magnitude" in name:  # positive, and near the norms that it starts from
            parameter.data.mul_(torch.rand(parameter.shape).add_(0.5))
        elif "lora_" in name or parameter.requires_grad:
            parameter.data.normal_(std=scale)  # in place: some are one
        if "lora_" in name and parameter.dtype != dtype:
            parameter.data = parameter.data.to(dtype)
    with warnings.catch_warnings():  # PEFT tells that it saves lm_head's base weight as well
        warnings.filterwarnings("ignore", "Setting `save_embedding_layers`")
        warnings.filterwarnings("ignore", "Could not find a config file in")
        warnings.filterwarnings("ignore", _NO_MATRIX)
        peft.save_pretrained(path, safe_serialization=safe)
    return path


def run_adapter(
    base: Path,
    adapter: Path,
    vocabulary: int | None = None,
    dtype: torch.dtype | None = None,
) -> PeftModel:
    """Base and adapter as they run, unmerged; in the base's own dtype without another."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype or "auto")
    if vocabulary is not None:
        model.resize_token_embeddings(vocabulary, mean_resizing=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", _NO_MATRIX)
        return PeftModel.from_pretrained(model, adapter)


def oracle(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """The state dict that PEFT's merge_and_unload gives."""
    merged = run_adapter(base, adapter).merge_and_unload()
    state = {name: tensor.detach().clone() for name, tensor in merged.state_dict().items()}
    if merged.config.tie_word_embeddings:
        del state["lm_head.weight"]
    return state


def deltas_of_adapter(*adapters: Path, weights: Sequence[float] = ()) -> dict[str, list[Delta]]:
    """The deltas of plain LoRA adapters, put together by PEFT's own matching of patterns."""
    deltas: dict[str, list[Delta]] = {}
    for adapter, weight in zip(adapters, weights or [1.0] * len(adapters), strict=True):
        config = LoraConfig.from_pretrained(adapter)
        factors = load_peft_weights(str(adapter), device="cpu")
        for key, a in factors.items():
            if not key.endswith(".lora_A.weight"):
                continue
            module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            pattern = config.alpha_pattern
            alpha = pattern.get(get_pattern_key(pattern, module), config.lora_alpha)
            scaling = alpha / (math.sqrt(len(a)) if config.use_rslora else len(a)) * weight
            b = factors[key.replace("lora_A", "lora_B")]
            deltas.setdefault(f"{module}.weight", []).append(Delta(a=a, b=b, scaling=scaling))
    return deltas


def read_tensors(out: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint directory, read by safetensors."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(out.glob("*.safetensors")):
        tensors.update(load_file(file))
    return tensors


def assert_same_tensors(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    """Names, dtypes, shapes and every bit are the same."""
    assert got.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert got[name].dtype == tensor.dtype, name
        assert got[name].shape == tensor.shape, name
        same = got[name].view(torch.uint8) if tensor.dim() else got[name]
        assert torch.equal(same, tensor.contiguous().view(torch.uint8)), name


def edit_json(path: Path, **changes: Any) -> None:
    """Change fields of a JSON file; None removes a field."""
    fields = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in fields.items() if v is not None}))


def changed(adapter: Path, path: Path, change: Callable[[Saved], Any], **fields: Any) -> Path:
    """A copy of an adapter, with other tensors and other fields."""
    shutil.copytree(adapter, path, dirs_exist_ok=True)
    saved = load_file(adapter / "adapter_model.safetensors")
    change(saved)
    save_file(saved, path / "adapter_model.safetensors")
    edit_json(path / "adapter_config.json", **fields)
    return path

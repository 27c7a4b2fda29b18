"""Adapters of every tuner other than LoRA, saved by PEFT with every parameter randomised."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from models import run_adapter
from peft import PeftConfig, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from transformers import AutoModelForCausalLM

LAYERS = ["q_proj", "o_proj", "up_proj", "down_proj"]
"""With and without a bias; square, tall and wide."""

CONFIGS: dict[str, dict[str, Any]] = {
    "ADALORA": {"init_r": 6, "target_r": 4, "total_step": 10, "lora_alpha": 10},
    "ADAMSS": {"r": 20, "num_subspaces": 3, "subspace_rank": 4},
    "BEFT": {"target_modules": ["q_proj", "v_proj"]},
    "BOFT": {"boft_block_size": 4, "boft_n_butterfly_factor": 2},
    "C3A": {"block_size": 16},
    "DEFT": {"r": 4},
    "DELORA": {"r": 4, "rank_pattern": {"q_proj": 3}},
    "FOURIERFT": {"n_frequency": 50, "n_frequency_pattern": {"q_proj": 40}},
    "GLORA": {"r": 3},
    "GRALORA": {"r": 4, "gralora_k": 2},
    "HIRA": {"r": 4, "rank_pattern": {"q_proj": 3}},
    "HRA": {"r": 4},
    "IA3": {"feedforward_modules": ["down_proj"]},
    "KASA": {"r": 4, "lora_alpha": 6, "kasa_config": {}, "rank_pattern": {"q_proj": 3}},
    "LN_TUNING": {"target_modules": ["input_layernorm", "norm"]},
    "LOHA": {"r": 3, "alpha": 5, "rank_pattern": {"q_proj": 2}},
    "LOKR": {"r": 3, "alpha": 5, "decompose_both": True},
    "MISS": {"r": 4},
    "OFT": {"r": 0, "oft_block_size": 16},
    "OSF": {"effective_rank": 8},
    "PEANUT": {"r": 4},
    "PSOFT": {"r": 4},
    "PVERA": {"r": 4},
    "RANDLORA": {"r": 4},
    "ROAD": {"group_size": 16},
    "SHIRA": {"r": 2, "random_seed": 3},
    "SUPERTUNING": {},
    "TINYLORA": {"u": 8},
    "UNILORA": {},
    "VBLORA": {"num_vectors": 8, "vector_length": 16},
    "VERA": {"r": 4},
    "WAVEFT": {"n_frequency": 50},
}
"""One adapter of each type that is merged."""

VARIANTS: dict[str, dict[str, Any]] = {
    "ADAMSS, dynamic ranks": {
        "r": 20,
        "num_subspaces": 4,
        "subspace_rank": 4,
        "use_dynamic_rank": True,
        "svd_threshold": 0.6,
        "use_asa": True,
    },
    "BOFT, trained biases": {"boft_block_size": 4, "bias": "boft_only"},
    "DEFT, PaRa": {"r": 4, "para": True},
    "DEFT, QR": {"r": 4, "decomposition_method": "qr"},
    "GLORA, vectors": {"r": 3, "config_A_B": "vector", "config_C": "vector"},
    "GLORA, constants": {"r": 3, "config_A_B": "constant", "config_D_E": "vector"},
    "GRALORA, hybrid": {"r": 6, "gralora_k": 2, "hybrid_r": 2},
    "HIRA, embeddings": {"r": 4, "target_modules": ["embed_tokens", "q_proj"]},
    "HRA, orthonormal": {"r": 4, "apply_GS": True},
    "IA3, regex": {
        "target_modules": r".*\.(q_proj|up_proj)",
        "feedforward_modules": r".*\.up_proj",
    },
    "IA3, a whole head": {"feedforward_modules": [], "modules_to_save": ["lm_head"]},
    "LOHA, one layer": {"r": 3, "layers_to_transform": [1], "layers_pattern": "layers"},
    "LOHA, all layers": {"r": 3, "target_modules": "all-linear"},
    "LOKR, whole": {"r": 40},
    "MISS, bat": {"r": 4, "init_weights": "bat"},
    "MISS, mini": {"r": 4, "init_weights": "mini", "mini_r": 4},
    "OFT, constrained": {"r": 4, "oft_block_size": 0, "coft": True, "eps": 1e-3},
    "OFT, shared, every bias": {"r": 0, "oft_block_size": 16, "block_share": True, "bias": "all"},
    "OFT, embeddings": {"r": 0, "oft_block_size": 16, "target_modules": ["embed_tokens"]},
    "PEANUT, deep": {"r": 4, "depth": 2},
    "PSOFT, not orthogonal": {"r": 4, "psoft_orth": False, "psoft_mag_a": False},
    "PVERA, no projection": {"r": 4, "save_projection": False},
    "PVERA, sampled": {"r": 4, "sample_at_inference": True, "generator_seed": 1},
    "RANDLORA, sparse": {"r": 4, "sparse": True, "save_projection": False},
    "ROAD, two": {"group_size": 16, "variant": "road_2"},
    "SUPERTUNING, low rank": {"r": 3, "lora_alpha": 5},
    "TINYLORA, tied, all layers": {
        "u": 8,
        "target_modules": "all-linear",
        "weight_tying": 0.7,
    },
    "TINYLORA, tied": {"u": 8, "weight_tying": 0.5, "save_projection": False},
    "TINYLORA, embeddings": {"u": 8, "target_modules": ["embed_tokens", "q_proj"]},
    "UNILORA, all layers": {"target_modules": "all-linear"},
    "UNILORA, indices": {"save_indices": True},
    "VBLORA, top weights": {
        "num_vectors": 8,
        "vector_length": 16,
        "save_only_topk_weights": True,
    },
    "VERA, no projection": {"r": 4, "save_projection": False, "projection_prng_key": 7},
    "WAVEFT, by size": {"n_frequency": 50, "proportional_parameters": True},
}
"""Other forms of the same, by type and what is different."""

ALL = {**CONFIGS, **VARIANTS}


def tuner_config(name: str, **changes: Any) -> PeftConfig:
    """The config of one of ``ALL``."""
    fields = {"target_modules": LAYERS, **ALL[name], **changes}
    kind = {"KASA": "LORA"}.get(name, name.partition(",")[0])
    return PEFT_TYPE_TO_CONFIG_MAPPING[kind](task_type="CAUSAL_LM", **fields)


def make_tuned(
    path: Path,
    base: Path,
    name: str,
    *,
    vocabulary: int | None = None,
    save_embedding_layers: bool | str = "auto",
    **changes: Any,
) -> Path:
    """One of ``ALL``, trained on ``base``, or on what it was resized to."""
    with _peft_at_ease():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(base)
        if vocabulary is not None:
            model.resize_token_embeddings(vocabulary, mean_resizing=False)
        tuned = get_peft_model(model, tuner_config(name, **changes))
        torch.manual_seed(1)
        for parameter in tuned.parameters():
            if parameter.requires_grad:  # near where it starts: some count as 1, some as a norm
                parameter.data += torch.randn(parameter.shape).mul_(0.1).to(parameter.dtype)
        tuned.save_pretrained(path, save_embedding_layers=save_embedding_layers)
    return path


def merged_by_peft(base: Path, adapter: Path, *, float32: bool = True) -> dict[str, torch.Tensor]:
    """What PEFT makes of a float32 copy of the base, or of the base as it is."""
    with _peft_at_ease():
        model = run_adapter(base, adapter, dtype=torch.float32 if float32 else None)
        for parameter in model.parameters():  # safetensors maps some to odd addresses, where MKL
            parameter.data = parameter.data.clone()  # multiplies in another order
        merged = model.merge_and_unload()
    state = {name: tensor.detach().clone() for name, tensor in merged.state_dict().items()}
    if merged.config.tie_word_embeddings:
        del state["lm_head.weight"]
    return state


@contextlib.contextmanager
def _peft_at_ease() -> Iterator[None]:
    """It warns of what it leaves out of files and of tied weights; and the last bits of products
    this small depend on the number of threads.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    torch.set_num_threads(threads)

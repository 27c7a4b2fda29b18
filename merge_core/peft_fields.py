"""What raymeld knows of PEFT: every config field, every tuner type, every kind of key.

Planning must not import PEFT (it takes seconds and pulls torch), so the tables stand here; a
test compares them with the installed PEFT, so that a field that PEFT adds is noticed. A field
or key that is in no table stops the plan: it may change the arithmetic.
"""

from __future__ import annotations

import re
from types import MappingProxyType

READ_FIELDS = frozenset(
    {
        "peft_type",
        "r",
        "lora_alpha",
        "use_rslora",
        "rank_pattern",
        "alpha_pattern",
        "fan_in_fan_out",
        "bias",
        "init_lora_weights",
    }
)
"""Fields that decide what a plain LoRA merge computes; ``adapter_config`` reads each of them."""

INERT_FIELDS = frozenset(
    {
        # Where the adapter came from.
        "task_type",
        "auto_mapping",
        "peft_version",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        # Which modules got factors: the keys in the file say the same.
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        # Training and initialisation only.
        "lora_dropout",
        "loftq_config",
        "eva_config",
        "corda_config",
        "lora_ga_config",
        "megatron_config",
        "megatron_core",
        "runtime_config",
        "qalora_group_size",
    }
)
"""Fields that cannot change what a merge computes, whatever they hold."""

FEATURE_FIELDS = MappingProxyType(
    {
        "use_dora": "DoRA",
        "lora_bias": "a bias on lora_B (lora_bias)",
        "modules_to_save": "fully trained modules (modules_to_save)",
        "trainable_token_indices": "trainable tokens",
        "target_parameters": "LoRA on parameters (target_parameters)",
        "layer_replication": "layer replication",
        "use_bdlora": "BD-LoRA",
        "kasa_config": "KaSA",
        "velora_config": "VeLoRA",
        "monteclora_config": "MonteCLoRA",
        "alora_invocation_tokens": "aLoRA",
        "arrow_config": "Arrow",
        "use_qalora": "QALoRA",
        "ensure_weight_tying": "weight tying (ensure_weight_tying)",
    }
)
"""Fields of features that are not merged yet: refused by name unless they are off."""

FEATURE_KEYS = (
    (re.compile(r"\.lora_magnitude_vector(\.weight)?\Z"), "DoRA"),
    (re.compile(r"\.lora_B\.bias\Z"), "a bias on lora_B (lora_bias)"),
    (re.compile(r"\.lora_embedding_[AB]\Z"), "LoRA on embeddings"),
    (re.compile(r"\.token_adapter\.|\.trainable_tokens_delta\Z"), "trainable tokens"),
    (re.compile(r"\.modules_to_save\."), "fully trained modules (modules_to_save)"),
    (re.compile(r"\.lora_velora_embed"), "VeLoRA"),
    (re.compile(r"\.lora_monteclora_sampler\."), "MonteCLoRA"),
    (re.compile(r"\.lora_diag\Z"), "KaSA"),
    (re.compile(r"\.base_layer\.lora_[AB]\.weight\Z"), "LoRA on parameters (target_parameters)"),
    (re.compile(r"\.bias\Z"), "trained biases (bias)"),
    (re.compile(r"\.lora_E\Z|\.ranknum\Z"), "AdaLoRA"),
    (
        re.compile(r"(?<!\.lora_A)(?<!\.lora_B)(?<!\.default)\.weight\Z"),
        "fully trained modules (modules_to_save)",
    ),
)
"""Kinds of keys that are not merged yet, first match wins."""

PLAIN_INITS = frozenset({"true", "false", "gaussian", "eva", "orthogonal"})
"""``init_lora_weights`` that leave the base as it is, lower-cased."""

# fmt: off
TUNERS = frozenset({
    "ADALORA", "ADAMSS", "ADAPTION_PROMPT", "BEFT", "BOFT", "BONE", "C3A", "CARTRIDGE", "CPT",
    "DEFT", "DELORA", "FOURIERFT", "FROD", "GLORA", "GRALORA", "HIRA", "HRA", "IA3", "LILY",
    "LN_TUNING", "LOHA", "LOKR", "LORA", "MISS", "MULTITASK_PROMPT_TUNING", "OFT", "OSF",
    "PEANUT", "POLY", "PREFIX_TUNING", "PROMPT_TUNING", "PSOFT", "PVERA", "P_TUNING",
    "RANDLORA", "ROAD", "SHADOW", "SHIRA", "SUPERTUNING", "TINYLORA", "TRAINABLE_TOKENS",
    "UNILORA", "VBLORA", "VERA", "WAVEFT", "XLORA",
})
# fmt: on
"""Every ``peft_type``; BONE is what PEFT before 0.18 called MISS."""

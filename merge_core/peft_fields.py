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
        "lora_bias",
        "use_dora",
        "modules_to_save",
        "trainable_token_indices",
        "ensure_weight_tying",
        "init_lora_weights",
        "target_parameters",
        "use_bdlora",
        "peft_version",
    }
)
"""Fields that decide what a LoRA merge computes; ``adapter_config`` reads each of them."""

TOKEN_FIELDS = frozenset({"peft_type", "token_indices", "peft_version"})
"""Fields that decide it for TRAINABLE_TOKENS."""

INERT_FIELDS = frozenset(
    {
        # Where the adapter came from.
        "task_type",
        "auto_mapping",
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
        "velora_config",
        "monteclora_config",
        "init_weights",
    }
)
"""Fields that cannot change what a merge computes, whatever they hold."""

FEATURE_FIELDS = MappingProxyType(
    {
        "layer_replication": "layer replication",
        "kasa_config": "KaSA",
        "alora_invocation_tokens": "aLoRA",
        "arrow_config": "Arrow",
        "use_qalora": "QALoRA",
    }
)
"""Fields of features that are not merged yet: refused by name unless they are off."""

FEATURE_KEYS = (
    (re.compile(r"\.lora_diag\Z"), "KaSA"),
    (re.compile(r"\.lora_E\Z|\.ranknum\Z"), "AdaLoRA"),
)
"""Kinds of keys that are not merged yet."""

TRAINING_KEYS = re.compile(r"\.(lora_velora_embed|lora_monteclora_sampler\.)[^/]*\Z")
"""Tensors that only steered the training (VeLoRA, MonteCLoRA); PEFT merges such adapters as plain
LoRA and ignores them, ``tuners/lora/variants.py``."""

PLAIN_INITS = frozenset({"true", "false", "gaussian", "eva", "mica", "orthogonal"})
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

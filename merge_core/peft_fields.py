"""What raymeld knows of PEFT: the fields of its configs, and the keys that no merge uses.

Planning must not import PEFT (it takes seconds and pulls torch), so the tables stand here, and
those of the tuners other than LoRA in ``peft_tuners``; a test compares them with the installed
PEFT, so that a field that PEFT adds is noticed. A field or key that is in no table stops the plan:
it may change the arithmetic.
"""

from __future__ import annotations

import re

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
        "layer_replication",
        "init_lora_weights",
        "target_parameters",
        "use_bdlora",
        "peft_version",
        "kasa_config",
    }
)
"""Fields that decide what a LoRA merge computes; ``adapter_config`` reads each of them."""

TOKEN_FIELDS = frozenset({"peft_type", "token_indices", "peft_version"})
"""Fields that decide it for TRAINABLE_TOKENS."""

NORM_FIELDS = frozenset({"peft_type", "modules_to_save", "peft_version"})
"""Fields that decide it for LN_TUNING."""

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

TRAINING_KEYS = re.compile(r"\.(lora_velora_embed|lora_monteclora_sampler\.)[^/]*\Z")
"""Tensors that only steered the training (VeLoRA, MonteCLoRA); PEFT merges such adapters as plain
LoRA and ignores them, ``tuners/lora/variants.py``."""

PLAIN_INITS = frozenset({"true", "false", "gaussian", "eva", "mica", "orthogonal"})
"""``init_lora_weights`` that leave the base as it is, lower-cased."""

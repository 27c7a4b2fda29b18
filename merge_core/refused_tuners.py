"""The tuners that are not merged, and why."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

_PROMPTS = "it changes the input, not the weights"
_ROUTED = "its change of the weights depends on the input"

REFUSED: Mapping[str, str] = MappingProxyType(
    {
        "ADAPTION_PROMPT": _PROMPTS,
        "BONE": "PEFT renamed it to MISS in 0.18 and no longer reads it",
        "CARTRIDGE": _PROMPTS,
        "CPT": _PROMPTS,
        "FROD": "part of each layer is made from the weights of all others, and is not in the file",
        "LILY": "PEFT cannot merge it: layers share what depends on the input",
        "MULTITASK_PROMPT_TUNING": _PROMPTS,
        "POLY": _ROUTED,
        "PREFIX_TUNING": _PROMPTS,
        "PROMPT_TUNING": _PROMPTS,
        "P_TUNING": _PROMPTS,
        "SHADOW": "PEFT cannot merge it: a second model runs beside the first",
        "XLORA": _ROUTED,
    }
)
"""By ``peft_type``."""

REFUSED_VARIANTS: Mapping[str, str] = MappingProxyType(
    {
        "alora_invocation_tokens": "aLoRA changes the weights from some token on",
        "arrow_config": "Arrow chooses among adapters by the input",
        "use_qalora": "QALoRA adds to averages of its input, which PEFT cannot merge either",
    }
)
"""Fields of LoRA that are refused when they are set, and why."""

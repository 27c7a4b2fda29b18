"""LoRA on the parameters of fused experts (``target_parameters``): whose factors an adapter holds.

From version 5, transformers keeps the experts of a layer in two parameters of one module, each
[experts, out, in]. PEFT wraps the module once for each parameter that it trains, in the order in
which they are registered, so the first of them is innermost: below the most ``.base_layer``. The
file names no parameter; the config and that order do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from merge_core.adapter_config import AdapterConfig
from merge_core.adapter_keys import Part, unwrapped
from merge_core.errors import refuse
from merge_core.layout import TensorSpec

EXPERT_PARAMETERS: Mapping[str, tuple[str, ...]] = {
    "gate_up_proj": ("gate_proj", "up_proj"),
    "down_proj": ("down_proj",),
}
"""The parameters in the order in which they are registered, and the layers of one expert whose
weights lie in each, one below the other."""

_REPAIR = "Save the adapter again with PEFT; the file is damaged or incomplete"
_OTHER_CONFIG = "Use the adapter_config.json that was saved with these weights"


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertFactors:
    """The factors of one parameter, those of all experts in one matrix each."""

    a: TensorSpec
    """[rank * experts, in_features]: the rows of an expert lie together."""
    b: TensorSpec
    """[out_features, rank * experts]: an expert's columns lie as far apart as there are experts."""
    rank: int
    """Of each expert."""
    scaling: float
    """alpha / r (or alpha / sqrt(r)), without the adapter's weight."""

    @property
    def experts(self) -> int:
        """How many there are."""
        return self.a.shape[0] // self.rank


def holds_experts(module: str) -> bool:
    """Whether a module has the experts of a layer as its parameters."""
    return module.rpartition(".")[2] == "experts"


def check_parameter(config: AdapterConfig, at: str) -> None:
    """Make sure that an adapter can hold factors of a parameter.

    Raises:
        InputError: PEFT trains none with such a config.
    """
    for field, is_set in (("use_dora", config.dora), ("lora_bias", config.lora_bias)):
        if is_set:
            what = f"{field} is set, with which PEFT trains no parameters"
            raise refuse(what, at, _OTHER_CONFIG)


def _trained_parameters(module: str, config: AdapterConfig) -> list[str]:
    """Paths of the parameters of ``module`` that the config says were trained, in their order."""
    if not holds_experts(module):
        return []
    paths = (f"{module}.{name}" for name in EXPERT_PARAMETERS)
    return [path for path in paths if config.is_parameter(path)]


def parameter_of(wrapper: str, config: AdapterConfig, at: str) -> str | None:
    """Path of the parameter whose factors are found below ``wrapper``; None where they are those
    of a module's weight.

    Raises:
        InputError: the config trains no such parameter.
    """
    module, level = unwrapped(wrapper)
    if level == 0 and not holds_experts(module):
        return None
    trained = _trained_parameters(module, config)
    if level >= len(trained):
        what = f"has factors of parameter {level + 1}, target_parameters names {len(trained)} here"
        raise refuse(what, at, _OTHER_CONFIG)
    return trained[-1 - level]


def read_experts(
    parameter: str, parts: Mapping[Part, TensorSpec], config: AdapterConfig, at: str
) -> ExpertFactors:
    """The factors of one parameter.

    Raises:
        InputError: they do not fit one another or the config.
    """
    check_parameter(config, at)
    for part in sorted({Part.A, Part.B} ^ parts.keys()):
        state = "there, beside factors of a parameter" if part in parts else "missing"
        raise refuse(f"{part} is {state}", at, _REPAIR)
    a, b = parts[Part.A], parts[Part.B]
    for factor in (a, b):
        if len(factor.shape) != 2 or 0 in factor.shape:
            what = f"{factor.name} has shape {list(factor.shape)}, not two sizes above 0"
            raise refuse(what, at, _REPAIR)
    rank, scaling = config.resolve(parameter)
    if a.shape[0] != b.shape[1] or a.shape[0] % rank:
        what = (
            f"lora_A has {a.shape[0]} rows, lora_B {b.shape[1]} columns; the config says rank"
            f" {rank} for each expert"
        )
        raise refuse(what, at, _OTHER_CONFIG)
    return ExpertFactors(a=a, b=b, rank=rank, scaling=scaling)

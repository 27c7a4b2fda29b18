"""What an adapter's config says was trained, and its file holds nothing for.

Tensors get lost when a trainer gathers them from several processes, or when a download ends early.
Whatever is missing would be merged as if it had not been trained.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from merge_core.adapter import Adapter
from merge_core.adapter_config import saves
from merge_core.architecture import LINEAR_MODELS, is_tied
from merge_core.checkpoint import Checkpoint
from merge_core.errors import Problem, some_of
from merge_core.expert_factors import EXPERT_PARAMETERS, holds_experts
from merge_core.plan import Source

_EXPERT = re.compile(r"(.+\.experts)\.(?:0|[1-9]\d*)\.([^.]+)")

_REPAIR = "Save the adapter again; part of it is missing"


def missing_parts(
    adapter: Adapter, bases: Mapping[str, Source], checkpoint: Checkpoint
) -> Iterator[Problem]:
    """A problem for each field of the config that names more than the file holds.

    Args:
        bases: by name, both ends of tied ones.
    """
    tied = is_tied(checkpoint.config)
    # Of other models not every module is known.
    known = checkpoint.config.get("model_type") in LINEAR_MODELS
    fields = {
        "modules_to_save": list(_unsaved(adapter, bases)),
        "target_modules": list(_untrained(adapter, bases)) if known else [],
        "target_parameters": list(_without_parameters(adapter, bases)) if known else [],
        f"bias={adapter.config.bias}": list(_without_bias(adapter, bases)) if known else [],
        "trained tokens": list(_without_rows(adapter, tied=tied)),
    }
    for field, lost in fields.items():
        if lost:
            what = f"{field} covers {some_of(lost)}, for which the file holds nothing"
            yield Problem(what, str(adapter.path), _REPAIR)


def _unsaved(adapter: Adapter, bases: Mapping[str, Source]) -> Iterator[str]:
    """Tensors of modules that were trained as a whole, and modules that no model has."""
    trained, config = adapter.trained, adapter.config
    for name in bases:
        brought = not trained.whole.keys().isdisjoint((name, *_parameters(name)))
        if not brought and config.is_saved(name.rpartition(".")[0]):
            yield name
    there = {name.rpartition(".")[0] for name in (*bases, *trained.whole)}
    for module in config.saved:
        if not any(saves(module, path) for path in there):
            yield module


def _untrained(adapter: Adapter, bases: Mapping[str, Source]) -> Iterator[str]:
    config, trained = adapter.config, adapter.trained
    if config.peft_type == "LN_TUNING":
        yield from (
            name
            for name in bases
            if config.is_target(name.rpartition(".")[0]) and name not in trained.whole
        )
    elif trained.layers or config.peft_type == "LORA":
        # Tuners whose layers share all their tensors leave it to the config whose they are.
        yield from _without_factors(adapter, bases)


def _without_factors(adapter: Adapter, bases: Mapping[str, Source]) -> Iterator[str]:
    """Modules that PEFT gives factors.

    Experts were modules in older transformers alone: they are expected where the file has factors
    of any.
    """
    trained, config = adapter.trained.layers, adapter.config
    as_modules = any(map(_EXPERT.match, trained))
    for name, source in bases.items():
        for module in _modules(name, source.tensor.shape):
            if module in trained or (_EXPERT.match(module) and not as_modules):
                continue
            if config.is_target(module) and not config.is_saved(module):
                yield module


def _modules(name: str, shape: tuple[int, ...]) -> Iterator[str]:
    """The modules whose weights a tensor of the base holds."""
    module, _, part = name.rpartition(".")
    if len(shape) == 2:
        yield name.removesuffix(".weight")
    elif len(shape) == 3 and holds_experts(module):
        for layer in EXPERT_PARAMETERS.get(part, ()):
            yield from (f"{module}.{expert}.{layer}" for expert in range(shape[0]))


def _without_parameters(adapter: Adapter, bases: Mapping[str, Source]) -> Iterator[str]:
    """Parameters that PEFT gives factors; those of experts by their names in transformers 5."""
    trained = adapter.trained
    parameters = dict.fromkeys(path for name in bases for path in _parameters(name))
    for path in filter(adapter.config.is_parameter, parameters):
        if path not in trained.experts and path.removesuffix(".weight") not in trained.pairs:
            yield path


def _parameters(name: str) -> Iterator[str]:
    """The parameter that a tensor of the base is, or is part of."""
    match = _EXPERT.match(name)
    if match is None:
        yield name
        return
    module, layer = match.groups()
    yield from (f"{module}.{p}" for p, layers in EXPERT_PARAMETERS.items() if layer in layers)


def _without_bias(adapter: Adapter, bases: Mapping[str, Source]) -> Iterator[str]:
    """Biases that were trained with the factors."""
    for name in bases:
        module, _, part = name.rpartition(".")
        wanted = adapter.config.trains_bias(beside_factors=module in adapter.trained.layers)
        if part == "bias" and wanted and name not in adapter.trained.whole:
            yield name


def _without_rows(adapter: Adapter, *, tied: bool) -> Iterator[str]:
    """Embeddings of which rows were trained. Of a tied head, whose rows are those of the
    embeddings, PEFT saves none.
    """
    found = adapter.trained.tokens
    for name, tokens in adapter.config.tokens.items():
        if any(name in ("", module) or module.endswith(f".{name}") for module in found):
            continue
        if tied and name == "lm_head" and tokens in [rows.tokens for rows in found.values()]:
            continue
        yield name or "the embeddings"

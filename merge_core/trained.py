"""What an adapter trained, module by module: every tensor of its file, each in one place."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain

from merge_core.adapter_config import AdapterConfig
from merge_core.adapter_keys import Part, has_token_rows, parse_key
from merge_core.errors import InputError, Problem, gathered, refuse
from merge_core.expert_factors import ExpertFactors, check_parameter, parameter_of, read_experts
from merge_core.layout import MERGEABLE, TensorSpec
from merge_core.peft_fields import TRAINING_KEYS
from merge_core.tuned import Tuned, odd_dtypes, take_tuned
from merge_core.updates import Factor

_REPAIR = "Save the adapter again with PEFT; the file is damaged or incomplete"
_OTHER_CONFIG = "Use the adapter_config.json that was saved with these weights"

Parts = Mapping[Part, TensorSpec]


@dataclass(frozen=True, slots=True, kw_only=True)
class LowRankPair:
    """The factors of one module: delta = scaling * B @ A."""

    a: Factor
    """[rank, in_features]"""
    b: Factor
    """[out_features, rank]"""
    scaling: float
    """alpha / r (or alpha / sqrt(r)), without the adapter's weight."""
    embedding: bool = False
    """The module is an embedding, whose weight is [in_features, out_features]."""
    magnitude: TensorSpec | None = None
    """[out_features], of DoRA."""
    shift: TensorSpec | None = None
    """[out_features]: the bias of B."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRows:
    """Trained rows of an embedding."""

    tokens: tuple[int, ...]
    rows: TensorSpec
    """[number of tokens, dim]"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """Everything that an adapter's file holds, by the path of the module."""

    pairs: Mapping[str, LowRankPair]
    experts: Mapping[str, ExpertFactors]
    """By the path of the parameter."""
    tokens: Mapping[str, TokenRows]
    whole: Mapping[str, TensorSpec]
    """Tensors that take the place of the base's, by their name there."""
    twins: tuple[tuple[TensorSpec, TensorSpec], ...]
    """Tensors that were saved twice, and must be the same."""
    tuned: Tuned = field(default_factory=Tuned)

    @property
    def layers(self) -> Collection[str]:
        """The modules that have anything of a tuner."""
        return self.pairs.keys() | self.tuned.layers.keys()

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to merge: all tensors only steered the training."""
        held = (self.pairs, self.experts, self.tokens, self.whole)
        return not any((*held, self.tuned.layers, self.tuned.shared))


def read_trained(
    tensors: Sequence[TensorSpec], config: AdapterConfig | None, peft_type: str, where: str
) -> Trained | None:
    """Account for every tensor of an adapter's file.

    Args:
        config: None if it could not be read: then only the keys are looked at.

    Raises:
        InputError: with every tensor that is unknown, malformed, or not as the config says.
    """
    problems: list[Problem] = []
    tuned, others = take_tuned(tensors, peft_type)
    problems += odd_dtypes(tuned, where)
    modules = _by_module(others, where, problems)
    trained = None if config is None else _sorted_out(modules, tuned, config, where, problems)
    if not problems and trained is not None and trained.is_empty:
        what = "the file holds nothing that a merge uses"
        problems.append(Problem(what, where, _REPAIR))
    if problems:
        raise InputError(problems)
    return trained


def _sorted_out(
    modules: Mapping[str, Parts],
    tuned: Tuned,
    config: AdapterConfig,
    where: str,
    problems: list[Problem],
) -> Trained:
    pairs: dict[str, LowRankPair] = {}
    experts: dict[str, ExpertFactors] = {}
    tokens: dict[str, TokenRows] = {}
    for module, parts in modules.items():
        at = f"{where}, module {module}"
        with gathered(problems):
            if parts.keys() & _FACTORS:
                parameter = parameter_of(module, config, at)
                if parameter is None:
                    pairs[module] = _pair(module, parts, config, at)
                else:
                    experts[parameter] = read_experts(parameter, parts, config, at)
        with gathered(problems):
            if Part.TOKENS in parts:
                tokens[module] = _token_rows(module, parts[Part.TOKENS], config, at)
    whole: dict[str, TensorSpec] = {}
    twins: list[tuple[TensorSpec, TensorSpec]] = []
    for module, parts in modules.items():
        for kinds in _WHOLE:
            with gathered(problems):
                part, *others = kinds
                beside = bool(parts.keys() & _FACTORS) or _is_tuned(module, tuned, config)
                brought = _brought(module, parts, kinds, config, where, has_factors=beside)
                if brought is not None:
                    whole[f"{module}.{part}"] = brought
                    twins += [(brought, parts[kind]) for kind in others[:1] if kind in parts]
    return Trained(
        pairs=pairs,
        experts=experts,
        tokens=tokens,
        whole=whole,
        twins=tuple(twins),
        tuned=tuned,
    )


def _is_tuned(module: str, tuned: Tuned, config: AdapterConfig) -> bool:
    """UNILORA's file may hold nothing of any layer: then the config tells."""
    unnamed = bool(tuned.shared) and not tuned.layers
    return module in tuned.layers or (unnamed and config.is_target(module))


_WHOLE = (
    (Part.WEIGHT, Part.SAVED_WEIGHT, Part.ORIGINAL_WEIGHT),
    (Part.BIAS, Part.SAVED_BIAS, Part.ORIGINAL_BIAS),
    (Part.GATE_UP,),
    (Part.DOWN,),
)
_FACTORS = frozenset(Part) - {Part.TOKENS, *chain(*_WHOLE)}


def _by_module(
    tensors: Sequence[TensorSpec], where: str, problems: list[Problem]
) -> dict[str, dict[Part, TensorSpec]]:
    modules: dict[str, dict[Part, TensorSpec]] = {}
    unknown = []
    for tensor in tensors:
        key = parse_key(tensor.name)
        if key is None:
            unknown.append(tensor.name)
            continue
        parts = modules.setdefault(key.module, {})
        if key.part in parts:
            what = f"{tensor.name!r} and {parts[key.part].name!r} are the same tensor"
            problems.append(Problem(what, where, _REPAIR))
        elif tensor.dtype not in MERGEABLE:
            what = f"{tensor.name} is {tensor.dtype}, not F32, F16 or BF16"
            problems.append(Problem(what, where, "Cast the adapter to one of them"))
        parts[key.part] = tensor
    problems += _unknown(unknown, where)
    return modules


def _unknown(names: Sequence[str], where: str) -> Iterator[Problem]:
    for name in names:
        if not TRAINING_KEYS.search(name):
            what = f"key {name!r} is not known, and nothing is dropped silently"
            yield Problem(what, where, _REPAIR)


def _pair(module: str, parts: Parts, config: AdapterConfig, at: str) -> LowRankPair:
    if config.peft_type != "LORA":
        name = parts[max(parts.keys() & _FACTORS)].name
        raise refuse(
            f"{name!r} is a factor, and peft_type {config.peft_type} has none", at, _REPAIR
        )
    embedding = Part.EMBEDDING_A in parts or Part.EMBEDDING_B in parts
    if embedding and parts.keys() & {Part.A, Part.B}:
        raise refuse("has factors of a linear layer and of an embedding", at, _REPAIR)
    sides = (Part.EMBEDDING_A, Part.EMBEDDING_B) if embedding else (Part.A, Part.B)
    for side, other in (sides, sides[::-1]):
        if side in parts and other not in parts:
            raise refuse(f"has {side} but no {other}", at, _REPAIR)
    if sides[0] not in parts:
        raise refuse(f"has {min(parts.keys() & _FACTORS)} but no factors", at, _REPAIR)
    key, blocks = config.key_of(module), (1, 1)
    if key != module:
        check_parameter(config, at)
    elif config.block_diagonal and not embedding:
        blocks = config.block_diagonal.blocks_of(module, at)
    a, b = (_factor(parts[s], n, at) for s, n in zip(sides, blocks, strict=True))
    rank, scaling = config.resolve(key)
    if not a.shape[0] == b.shape[1] == rank:
        what = f"{sides[0]} has rank {a.shape[0]}, {sides[1]} {b.shape[1]}, the config says {rank}"
        raise refuse(what, at, _OTHER_CONFIG)
    return LowRankPair(
        a=a,
        b=b,
        scaling=scaling,
        embedding=embedding,
        magnitude=_vector(parts, Part.MAGNITUDE, "use_dora", b.shape[0], config.dora, at),
        shift=_vector(
            parts, Part.B_BIAS, "lora_bias", b.shape[0], config.lora_bias and not embedding, at
        ),
    )


def _factor(stored: TensorSpec, blocks: int, at: str) -> Factor:
    if len(stored.shape) != 2 or 0 in stored.shape:
        what = f"{stored.name} has shape {list(stored.shape)}, not two sizes above 0"
        raise refuse(what, at, _REPAIR)
    if stored.shape[0] % blocks:
        what = f"{stored.name} has {stored.shape[0]} rows, in {blocks} blocks of use_bdlora"
        raise refuse(what, at, _OTHER_CONFIG)
    return Factor(tensor=stored, blocks=blocks)


def _vector(
    parts: Parts, part: Part, field: str, size: int, expected: bool, at: str
) -> TensorSpec | None:
    """A vector of one element an output, which is there if and only if the config says so."""
    found = parts.get(part)
    if expected != (found is not None):
        what = (
            f"{field} is {str(expected).lower()}, and {part} is {'there' if found else 'missing'}"
        )
        raise refuse(what, at, _OTHER_CONFIG)
    if found is not None and found.shape != (size,):
        what = f"{found.name} has shape {list(found.shape)}, not {[size]}"
        raise refuse(what, at, _REPAIR)
    return found


def _brought(
    module: str,
    parts: Parts,
    kinds: Sequence[Part],
    config: AdapterConfig,
    where: str,
    *,
    has_factors: bool,
) -> TensorSpec | None:
    """The tensor that takes the place of the base's, if the config says why it is there."""
    part, *copies = kinds
    found = next((parts[kind] for kind in kinds if kind in parts), None)
    if found is None:
        return None
    name = found.name
    if ".base_layer." in name and not has_factors and Part.TOKENS not in parts:
        what = f"{name!r} stands beside factors, and there are none of this module"
        raise refuse(what, where, _REPAIR)
    if not parts.keys() & {part, *copies[:1]}:
        raise refuse(f"{name!r} is there without what was made of it", where, _REPAIR)
    named = config.is_saved(module) or config.ensures_tying
    if parts.keys() & set(copies) and not named:
        what = f"{name!r} is there, and modules_to_save does not name its module"
        raise refuse(what, where, _OTHER_CONFIG)
    if ".ln_tuning_layers." in name:
        explained = config.peft_type == "LN_TUNING"
    elif part == Part.BIAS:
        explained = config.trains_bias(beside_factors=has_factors)
    else:
        explained = part == Part.WEIGHT and (has_factors or has_token_rows(module))
    if explained or config.is_saved(module):
        return found
    field = "bias" if part == Part.BIAS else "modules_to_save"
    what = f"{name!r} is there as a whole, which {field} does not say"
    raise refuse(what, where, _OTHER_CONFIG)


def _token_rows(module: str, rows: TensorSpec, config: AdapterConfig, at: str) -> TokenRows:
    tokens = config.tokens_of(module)
    if tokens is None:
        what = f"{rows.name} is there, but the config names no trained tokens of this module"
        raise refuse(what, at, _OTHER_CONFIG)
    if len(rows.shape) != 2 or rows.shape[0] != len(tokens) or 0 in rows.shape:
        what = f"{rows.name} has shape {list(rows.shape)}, the config names {len(tokens)} tokens"
        raise refuse(what, at, _OTHER_CONFIG)
    return TokenRows(tokens=tokens, rows=rows)

"""Pairs each output tensor with its base tensor and its updates, from headers and configs alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from merge_core.errors import InputError, Problem, gathered, refuse
from merge_core.stores.location import Location
from merge_core.verify.adapter_fields import read_fields
from merge_core.verify.header import TensorEntry
from merge_core.verify.ledger import Row
from merge_core.verify.packed import rounded, unpacked
from merge_core.verify.places import read_bytes
from merge_core.verify.recipe import Recipe, adapter_recipe
from merge_core.verify.replicated import config_of_copies, ranges_of, with_copies
from merge_core.verify.report import Finding, at
from merge_core.verify.rounding import FLOATS
from merge_core.verify.same_values import same_values
from merge_core.verify.sources import Sources, WeightedAdapter, check_method
from merge_core.verify.strict_json import MalformedError, parse_object
from merge_core.verify.structure import Structure
from merge_core.verify.tied import HEAD, Wanted, repeated_head, settle, tied_embeddings
from merge_core.verify.updates import Update
from merge_core.verify.weights import BaseTensor, open_base

_VOCABULARY = ("embed_tokens.weight", "lm_head.weight", "wte.weight")
"""Tensors that an adapter may bring with more or fewer rows than the base has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What one output tensor must be equal to."""

    tensor: str
    base: BaseTensor
    """The base's, or that of an adapter which replaces it."""
    updates: tuple[Update, ...]
    """What the adapters do to it; empty for a tensor that must be ``base`` as it is."""
    replaced: bool = False
    """Whether ``base`` is an adapter's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pairing:
    """What a result is compared with."""

    comparisons: Mapping[str, tuple[Comparison, ...]]
    """By weight file."""
    config: Mapping[str, Any]
    """Fields of config.json that the merge changes; None: removes."""
    findings: tuple[Finding, ...]
    """Tensors of the output, the base or an adapter that have no counterpart of the same shape,
    or that the ledger calls something else."""
    unchecked: tuple[str, ...] = ()
    """Tensors of the output that are compared with nothing, see ``elsewhere``."""


def refuse_unchecked(sources: Sources) -> None:
    """Raise what level numeric would raise over base and adapters, before there is a result.

    Raises:
        InputError: they cannot be read, or hold features that cannot be checked.
    """
    problems: list[Problem] = []
    with gathered(problems):
        check_method(sources.method)
    with gathered(problems):
        tensors, config, _ = _opened(sources.base)
        _recipes(with_copies(tensors, _ranges(sources.adapters)), config, sources.adapters)
    if problems:
        raise InputError(problems)


def pair_with_base(structure: Structure, sources: Sources) -> Pairing:
    """What to compare each tensor of ``structure`` with.

    Raises:
        InputError: base or adapters cannot be read, or hold features that cannot be checked.
    """
    check_method(sources.method)
    tensors, config, both = _opened(sources.base)
    if sources.simulate_nf4:
        tensors = rounded(tensors)
    ranges = _ranges(sources.adapters)
    tensors = with_copies(tensors, ranges)
    recipes, found = _recipes(tensors, config, sources.adapters)
    names = {entry.name for entries in structure.headers.values() for entry in entries}
    wanted, changes, unfit = _wanted(tensors, config, recipes, names, keep_tied=sources.keep_tied)
    changes |= config_of_copies(config, ranges)
    findings, unchecked = [*_unlike(both), *found, *unfit], list[str]()
    comparisons: dict[str, tuple[Comparison, ...]] = {}
    for file, entries in structure.headers.items():
        pairs = []
        for entry in entries:
            mine = wanted.get(entry.name)
            wrong = _mismatch(entry, mine)
            if mine is not None and mine.unchecked and wrong is None:
                unchecked.append(entry.name)
            elif mine is not None and wrong is None:
                pairs.append(
                    Comparison(
                        tensor=entry.name,
                        base=mine.base,
                        updates=tuple(mine.updates),
                        replaced=mine.replaced is not None,
                    )
                )
                findings += _action(file, entry, mine, structure.rows or {})
            else:
                findings.append(Finding(check="base", where=at(file, entry.name), what=str(wrong)))
        comparisons[file] = tuple(pairs)
    # With an unreadable header the tensors in it only look as if they were missing.
    if len(structure.headers) == len(structure.files):
        findings += _missing(wanted, names)
    return Pairing(
        comparisons=comparisons,
        config=changes,
        findings=tuple(findings),
        unchecked=tuple(unchecked),
    )


def _ranges(adapters: Sequence[WeightedAdapter]) -> list[list[int]]:
    fields = [read_fields(path / "adapter_config.json") for path, _ in adapters]
    return ranges_of(fields, ", ".join(str(path) for path, _ in adapters))


def _unlike(both: tuple[BaseTensor, BaseTensor] | None) -> Iterator[Finding]:
    if both is not None and not same_values(*both):
        what = "the base ties it to the embeddings, and stores other values of it"
        yield Finding(check="base", where=HEAD, what=what)


def _opened(
    base: Location,
) -> tuple[dict[str, BaseTensor], dict[str, Any], tuple[BaseTensor, BaseTensor] | None]:
    """The base's tensors as a merge sees them, its config, and two of which one is left out."""
    stored, config = open_base(base), _base_config(base)
    tensors = unpacked(stored, config)
    both = repeated_head(config, tensors)
    if both is not None:
        del tensors[HEAD]
    return tensors, config, both


def _base_config(base: Location) -> dict[str, Any]:
    try:
        return parse_object(read_bytes(base / "config.json"), constants=True)
    except (OSError, MalformedError) as error:
        what = f"the base's config cannot be read ({error})"
        raise refuse(what, str(base), "Name the base that was merged with --base") from error


def _recipes(
    tensors: Mapping[str, BaseTensor],
    config: Mapping[str, Any],
    adapters: Sequence[WeightedAdapter],
) -> tuple[list[Recipe], list[Finding]]:
    """Of each adapter, in order; every adapter's problems at once."""
    shapes = {name: tensor.entry.shape for name, tensor in tensors.items()}
    embeddings = tied_embeddings(config, shapes)
    if embeddings is not None:
        shapes[HEAD] = shapes[embeddings]
    recipes: list[Recipe] = []
    findings: list[Finding] = []
    problems: list[Problem] = []
    for path, weight in adapters:
        with gathered(problems):
            recipe, unmatched = adapter_recipe(path, weight, shapes, config.get("model_type"))
            recipes.append(recipe)
            findings += unmatched
    if problems:
        raise InputError(problems)
    return recipes, findings


def _wanted(
    tensors: Mapping[str, BaseTensor],
    config: Mapping[str, Any],
    recipes: Sequence[Recipe],
    names: set[str],
    *,
    keep_tied: bool,
) -> tuple[dict[str, Wanted], dict[str, Any], list[Finding]]:
    """What the result must have, the fields of its config that differ, and what fits nowhere."""
    wanted = {name: Wanted(base=tensor) for name, tensor in tensors.items()}
    embeddings = tied_embeddings(config, tensors)
    if embeddings is not None:
        wanted[HEAD] = Wanted(base=tensors[embeddings])
    changes: dict[str, Any] = dict.fromkeys({"quantization_config"} & config.keys())
    findings: list[Finding] = []
    for recipe in recipes:
        for name, brought in recipe.whole.items():
            wrong = _replace(wanted.get(name), recipe, brought, changes)
            if wrong is not None:
                where = f"{recipe.factors.path}: {name}"
                findings.append(Finding(check="adapter", where=where, what=wrong))
        for name, updates in recipe.updates.items():
            wanted[name].updates += updates
        for name in recipe.unchecked:
            wanted[name].unchecked = True
    if embeddings is not None:
        has_head = HEAD in names
        changes |= {"tie_word_embeddings": False} if has_head else {}
        told = settle(wanted, embeddings, recipes, has_head=has_head, keep_tied=keep_tied)
        if told is not None:
            findings.append(Finding(check="base", where=embeddings, what=told))
    return wanted, changes, findings


def _replace(
    mine: Wanted | None, recipe: Recipe, brought: BaseTensor, changes: dict[str, Any]
) -> str | None:
    """Have an adapter's tensor take the place of the base's; why it cannot, if so."""
    if mine is None:
        return "the base has no such tensor"
    old = mine.base.entry
    if brought.entry.shape != old.shape:
        if not old.name.endswith(_VOCABULARY) or brought.entry.shape[1:] != old.shape[1:]:
            return f"its shape is {list(brought.entry.shape)}, the base's is {list(old.shape)}"
        changes["vocab_size"] = brought.entry.shape[0]
    if mine.replaced is not None and not same_values(brought, mine.base):
        return "another adapter brings other values of it"
    if mine.replaced is None:
        mine.base, mine.replaced = brought, recipe
    return None


def _mismatch(entry: TensorEntry, wanted: Wanted | None) -> str | None:
    """Why the output tensor cannot be compared."""
    if wanted is None:
        return "the base has no such tensor"
    old = wanted.base.entry
    if entry.shape != old.shape:
        whose = "base's" if wanted.replaced is None else "adapter's"
        return f"its shape is {list(entry.shape)}, the {whose} is {list(old.shape)}"
    changes = wanted.updates or entry.dtype != old.dtype
    if changes and not {entry.dtype, old.dtype} <= set(FLOATS):
        return f"{old.dtype} in the base, {entry.dtype} here: only {', '.join(FLOATS)} can change"
    return None


def _action(
    file: str, entry: TensorEntry, wanted: Wanted, rows: Mapping[str, Row]
) -> Iterator[Finding]:
    """The ledger must call the tensor what the adapters and the dtypes make it."""
    row = rows.get(entry.name)
    if wanted.updates:
        action = "merged"
    elif wanted.replaced is not None:
        action = "replaced"
    elif wanted.base.packing is not None:
        action = "decoded"
    else:
        action = "copied" if entry.dtype == wanted.base.entry.dtype else "converted"
    if row is not None and row.action != action:
        what = f"the ledger says {row.action}, base and adapters make it {action}"
        yield Finding(check="ledger", where=at(file, entry.name), what=what)


def _missing(wanted: Mapping[str, Wanted], seen: set[str]) -> Iterator[Finding]:
    for name in sorted(wanted.keys() - seen):
        what = "the base has it, the output has not"
        yield Finding(check="base", where=name, what=what)

"""``--combine``: which adapters' factors become one, and whether they can."""

from __future__ import annotations

import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from merge_core.adapter import Adapter
from merge_core.errors import InputError, Problem, some_of
from merge_core.matched import Matched
from merge_core.updates import CombinedUpdate, LowRankUpdate, Update
from merge_core.updates.combined import Combination, Method

METHODS: tuple[str, ...] = typing.get_args(Method)

_SAME_RANKS = frozenset({"linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"})
"""Methods that take the adapters' A, and their B, together element by element."""


def check_combination(how: Combination, adapters: int) -> None:
    """Make sure that the options of a combination belong together.

    Raises:
        InputError: with each that does not.
    """
    problems = list(_wrong_options(how, adapters))
    if problems:
        raise InputError(problems)


def _wrong_options(how: Combination, adapters: int) -> Iterator[Problem]:
    if how.method not in METHODS:
        what = f"there is no way to combine called {how.method!r}"
        yield Problem(what, "--combine", f"Use one of {', '.join(METHODS)}")
        return
    if how.method != "sum" and adapters < 2:
        what = f"{how.method} combines several adapters, and there is {adapters}"
        yield Problem(what, "--combine", "Leave --combine out, or name another adapter")
    if how.prunes and how.density is None:
        yield Problem(f"{how.method} needs a density", "--density", "Give a share such as 0.5")
    if how.density is not None:
        yield from _wrong_density(how.density)
    if how.majority_sign not in (None, "total", "frequency"):
        what = f"{how.majority_sign!r} elects no sign"
        yield Problem(what, "--majority-sign", "Give total or frequency")
    for option, value, fits in (
        ("--density", how.density, how.prunes),
        ("--majority-sign", how.majority_sign, how.elects),
        ("--seed", how.seed, how.drops),
    ):
        if value is not None and not fits:
            yield Problem(f"--combine {how.method} has no use for it", option, "Leave it out")


def check_density(density: float) -> None:
    """Make sure that it is a share.

    Raises:
        InputError: it is none.
    """
    problems = list(_wrong_density(density))
    if problems:
        raise InputError(problems)


def _wrong_density(density: float) -> Iterator[Problem]:
    if not 0 < density <= 1:
        what = f"{density:g} is no share of the elements"
        yield Problem(what, "--density", "Give a number above 0, at most 1")


def combined(
    matched: Matched, adapters: Sequence[Adapter], how: Combination
) -> Mapping[str, Sequence[Update]]:
    """The updates of each tensor: as they are, or in one where they are not just summed.

    Raises:
        InputError: with everything that only ``sum`` can merge.
    """
    if how.method == "sum":
        return matched.updates
    problems = list(_uncombinable(matched, adapters, how))
    if problems:
        raise InputError(problems)
    rank = max(max(a.config.rank, *a.config.rank_pattern.values(), 0) for a in adapters)
    matched.notes.append(_words(how, len(adapters)))
    unweighted = [_scalings(adapter) for adapter in adapters]
    parts = {
        name: tuple(
            replace(update, scaling=unweighted[update.adapter][update.a.tensor.name])
            for update in updates
            if isinstance(update, LowRankUpdate)
        )
        for name, updates in matched.updates.items()
    }
    return {name: [_as_one(name, parts[name], adapters, how, rank)] for name in parts}


def _scalings(adapter: Adapter) -> dict[str, float]:
    """Without the adapter's weight, by the name of A: with tied weights a delta may be of another
    module than the tensor that it is added to.
    """
    return {pair.a.tensor.name: pair.scaling for pair in adapter.trained.pairs.values()}


def _as_one(
    name: str,
    parts: tuple[LowRankUpdate, ...],
    adapters: Sequence[Adapter],
    how: Combination,
    rank: int,
) -> CombinedUpdate:
    if how.method == "cat":
        rank = sum(part.rank for part in parts)
    else:
        rank = min(rank, *parts[0].shape) if how.truncates else parts[0].rank
    return CombinedUpdate(
        how=how,
        parts=parts,
        weights=tuple(adapters[part.adapter].weight for part in parts),
        rank=rank,
        tensor=name,
    )


def _uncombinable(
    matched: Matched, adapters: Sequence[Adapter], how: Combination
) -> Iterator[Problem]:
    """One problem a kind and adapter, one a tensor whose factors do not fit one another."""
    others: dict[tuple[int, str], list[str]] = {}
    for name, updates in matched.updates.items():
        for update in updates:
            if not isinstance(update, LowRankUpdate):
                others.setdefault((update.adapter, update.kind), []).append(name)
            elif not all(factor.is_stored for factor in update.factors):
                others.setdefault((update.adapter, "stacked"), []).append(name)
    beside = [_beside_factors(adapter) for adapter in adapters]
    for name, source in matched.sources.items():
        number = source.adapter
        if number is not None and source.tensor.name not in beside[number]:
            others.setdefault((number, "whole"), []).append(name)
    for (number, kind), names in others.items():
        what = f"{how.method} combines low-rank factors alone, and it has {_KINDS[kind]}"
        yield Problem(what, f"{adapters[number].path}, {some_of(names)}", _AS_SUM)
    for name, updates in matched.updates.items():
        pairs = [update for update in updates if isinstance(update, LowRankUpdate)]
        yield from _unfit(name, pairs, how)


def _beside_factors(adapter: Adapter) -> frozenset[str]:
    """Names of the weights that PEFT saved beside their factors; tied ends have one of them."""
    trained = adapter.trained
    weights = (trained.whole.get(f"{module}.weight") for module in trained.pairs)
    return frozenset(weight.name for weight in weights if weight is not None)


_AS_SUM = "Merge with --combine sum"
_KINDS: Mapping[str, str] = {
    "dora": "DoRA",
    "shift": "lora_bias",
    "rows": "trained tokens",
    "through_peft": "layers that PEFT merges",
    "stacked": "factors in parts, of experts or of blocks",
    "whole": "whole tensors",
}


def _unfit(name: str, pairs: Sequence[LowRankUpdate], how: Combination) -> Iterator[Problem]:
    """Why the factors of one tensor do not go together."""
    ranks = [pair.rank for pair in pairs]
    if len({pair.adapter for pair in pairs}) < len(pairs):
        what = f"{how.method} cannot combine what one adapter trained of both tied ends"
        yield Problem(what, f"tensor {name}", f"{_AS_SUM}, or leave --keep-tied out")
    elif len({pair.transposed for pair in pairs}) > 1:
        what = f"{how.method} cannot combine factors of the embeddings with those of the head"
        yield Problem(what, f"tensor {name}", f"{_AS_SUM}, or leave --keep-tied out")
    elif how.method in _SAME_RANKS and len(set(ranks)) > 1:
        what = f"{how.method} needs factors of one rank, these have {ranks}"
        yield Problem(what, f"tensor {name}", "Use cat or svd, or a method with _svd behind it")


def _words(how: Combination, adapters: int) -> str:
    parts = [f"the factors of {adapters} adapters are combined by {how.method}"]
    if how.density is not None:
        parts.append(f"density {how.density:g}")
    if how.elects:
        parts.append(f"majority sign by {how.majority_sign or 'total'}")
    if how.drops:
        parts.append(f"seed {how.seed or 0}")
    return ", ".join(parts)

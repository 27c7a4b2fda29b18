"""Embeddings and head that are one tensor in the base: what each of them must be in the result.

While base and adapter run, each end has what was trained of it. So a result with a head of its own
must have both ends as they were trained, and one without a head must have one tensor that is right
for both, unless the merge was asked to keep them tied: then it has everything that was trained of
either.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from merge_core.verify.adapter_fields import saved_whole
from merge_core.verify.recipe import Recipe
from merge_core.verify.updates import Delta, Rows, Update
from merge_core.verify.weights import BaseTensor

HEAD = "lm_head.weight"

_EMBEDDINGS = ("embed_tokens.weight", "wte.weight")


@dataclass(slots=True, kw_only=True)
class Wanted:
    """What a tensor of the result starts from, and what is done to it."""

    base: BaseTensor
    replaced: Recipe | None = None
    """The adapter that brings ``base``; None if it is the base's own."""
    updates: list[Update] = field(default_factory=list)
    unchecked: bool = False
    """Whether something else is done to it, which is not worked out here."""


def repeated_head(
    config: Mapping[str, Any], tensors: Mapping[str, BaseTensor]
) -> tuple[BaseTensor, BaseTensor] | None:
    """Embeddings and head, if they are tied and the base stores both: it must repeat them then, and
    counts for nothing.
    """
    others = {name: tensor for name, tensor in tensors.items() if name != HEAD}
    embeddings = tied_embeddings(config, others)
    if HEAD not in tensors or embeddings is None:
        return None
    return tensors[embeddings], tensors[HEAD]


def tied_embeddings(config: Mapping[str, Any], names: Collection[str]) -> str | None:
    """The tensor that is both ends; None if there is none.

    Where the config is silent, Qwen's classes in transformers say no, and the others yes.
    """
    by_default = not str(config.get("model_type")).startswith("qwen2")
    if HEAD in names or not config.get("tie_word_embeddings", by_default):
        return None
    return next((name for name in names if name.endswith(_EMBEDDINGS)), None)


def settle(
    wanted: dict[str, Wanted],
    embeddings: str,
    recipes: Sequence[Recipe],
    *,
    has_head: bool,
    keep_tied: bool,
) -> str | None:
    """Leave what the result must have: the head as well if it has one, else the embeddings alone.

    Args:
        wanted: with both ends.
        has_head: whether the result has a head of its own.
        keep_tied: whether the merge was asked for one tensor, whatever was trained of either.

    Returns:
        What is wrong with there being no head, if something is.
    """
    both, head = wanted[embeddings], wanted[HEAD]
    _share_whole(both, head, embeddings.removesuffix(".weight"))
    _share_rows(both, head)
    for recipe in recipes:
        if recipe.config.get("ensure_weight_tying"):
            _share_factors(both, head, recipe)
    if has_head:
        return None
    wrong, both.unchecked = None, both.unchecked or head.unchecked
    same = both.base == head.base and both.updates == head.updates
    if not same and keep_tied:
        if both.replaced is None and head.replaced is not None:
            both.base, both.replaced = head.base, head.replaced
        both.updates += [update for update in head.updates if update not in both.updates]
    elif not same:
        wrong = "embeddings and head were trained apart, and there is one tensor for both"
    del wanted[HEAD]
    return wrong


def _share_whole(both: Wanted, head: Wanted, embeddings: str) -> None:
    """What PEFT saves by itself, after a change of the vocabulary, is of the one tensor that both
    ends were while it trained, and so is that of modules that were to stay tied.
    """
    for mine, other, module in ((both, head, embeddings), (head, both, "lm_head")):
        if mine.replaced is None or other.replaced is not None:
            continue
        config = mine.replaced.config
        if config.get("ensure_weight_tying") or not saved_whole(config, module):
            other.base, other.replaced = mine.base, mine.replaced
    if both.replaced is not None and both.replaced is head.replaced:
        config = both.replaced.config
        named = saved_whole(config, embeddings) or saved_whole(config, "lm_head")
        if config.get("ensure_weight_tying") or not named:
            head.base = both.base


def _share_rows(both: Wanted, head: Wanted) -> None:
    """Trained tokens of tied embeddings are those of the head, unless it has others of its own."""
    mine = [update for update in head.updates if isinstance(update, Rows)]
    for update in both.updates:
        if not isinstance(update, Rows):
            continue
        other = next((rows for rows in mine if rows.path == update.path), None)
        if other is None:
            head.updates.append(update)
        elif other.tokens == update.tokens:
            head.updates[head.updates.index(other)] = update


def _share_factors(both: Wanted, head: Wanted, recipe: Recipe) -> None:
    """With ``ensure_weight_tying`` the same factors are saved for both ends, transposed."""
    read, path = recipe.factors.read, recipe.factors.path
    for mine in [u for u in both.updates if isinstance(u, Delta) and u.path == path]:
        for number, other in enumerate(head.updates):
            if not isinstance(other, Delta) or other.path != path or other.scale != mine.scale:
                continue
            pairs = ((mine.a, other.b), (mine.b, other.a))
            if all(np.array_equal(read(one), read(two).T) for one, two in pairs):
                head.updates[number] = mine

"""The words of a merge: a base and adapters, adapters alone, or a recipe that names them.

A recipe lies on this machine, as it stands for what would be typed here.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from merge_core.adapter import AdapterWord
from merge_core.errors import InputError, refuse
from merge_core.stores.location import DEFAULT_ACCESS, Access, Place
from merge_core.trainer_output import split_words


def is_recipe(word: str) -> bool:
    """Whether a word is a recipe rather than a folder."""
    return word.lower().endswith((".yaml", ".yml")) and not os.path.isdir(word)


def take_defaults(context: typer.Context, words: list[str] | None) -> list[str] | None:
    """Have the options of a recipe count as defaults: flags, and the environment, come before.

    What is wrong in a recipe is told by ``named_by``; until then nobody may ask for what it has.
    """
    if words and is_recipe(words[0]):
        from cluster.recipe import read_recipe  # and pydantic, which others need not wait for

        try:
            context.default_map = dict(read_recipe(Path(words[0])).options)
        except InputError:
            context.default_map = {"out": words[0]}
    return words


Words = Annotated[
    list[str],
    typer.Argument(
        metavar="[BASE] ADAPTER[@WEIGHT]...",
        help="Paths, s3://, hub ids, as my-lora@0.5; a recipe.",
        callback=take_defaults,
        is_eager=True,
    ),
]


def named_by(
    words: Sequence[str], access: Access = DEFAULT_ACCESS
) -> tuple[Place | None, Sequence[AdapterWord]]:
    """Base and adapters.

    Args:
        access: how the first of them is reached, if it lies in a store: it tells which it is.

    Returns:
        None as the base, if the adapters' own one is meant.

    Raises:
        InputError: with everything that is wrong in a recipe.
    """
    if not is_recipe(words[0]):
        return split_words(words, access)
    if "://" in words[0]:
        raise refuse("a recipe is read from a disk", words[0], "Fetch it, and give the file")
    if len(words) > 1:
        what = "a recipe names base and adapters itself"
        raise refuse(what, words[0], f"Leave {' '.join(words[1:3])} out, or the recipe")
    from cluster.recipe import read_recipe

    recipe = read_recipe(Path(words[0]))
    return recipe.base, recipe.adapters

"""The recipe command: the flags of a merge, written down."""

from __future__ import annotations

import codecs
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cluster.answering import answering
from cluster.help_screen import ONE_MERGE, App
from cluster.hub_options import HubOptions
from cluster.option_groups import Option, with_options
from cluster.options import Debug
from cluster.plan_options import PlanOptions
from cluster.run_options import RunOptions
from cluster.words import Words, named_by
from merge_core.adapter import parse_adapter
from merge_core.recipe_text import recipe_text
from merge_core.stores.location import locate

_HEAD = (
    "A recipe: `raymeld merge recipe.yaml` does what stands here. Flags of the command come first,"
    " then $RAY_ADDRESS, then these lines. Relative paths start in the directory of this file."
)


def register(app: App) -> None:
    """Add the command to ``app``."""
    app.add(recipe, rich_help_panel=ONE_MERGE)


@with_options(run=RunOptions, asked=PlanOptions, hub=HubOptions)
def recipe(
    *, words: Words, run: RunOptions, asked: PlanOptions, hub: HubOptions, debug: Debug = False
) -> None:
    """Write a merge down as a recipe; merges nothing.

    raymeld recipe Qwen1.5-7B my-lora@0.5 --out merged > recipe.yaml
    raymeld merge recipe.yaml
    """
    with answering(as_json=False, debug=debug):
        from cluster import console
        from cluster.recipe_model import recipe_options

        values = _values(words, asked, run, hub)
        about = {option.name: _about(option) for option in recipe_options()}
        text = _as_printed(recipe_text(_HEAD, values, about))
        console.answer(text.splitlines(), {}, as_json=False)


def _as_printed(text: str) -> str:
    """A recipe is read as UTF-8: where stdout writes anything else, it is told in ASCII, for
    which YAML has the escapes that Python has.
    """
    if codecs.lookup(sys.stdout.encoding or "ascii").name == "utf-8":
        return text
    return text.encode("ascii", "backslashreplace").decode("ascii")


def _about(option: Option) -> str:
    """What it does, and what holds where it is left out, as ``--help`` has it."""
    default = getattr(option.default, "value", option.default)
    if option.is_required or not default:
        return option.help
    return (
        f"{option.help} [{default:g}]"
        if isinstance(default, float)
        else f"{option.help} [{default}]"
    )


def _values(
    words: list[str], asked: PlanOptions, run: RunOptions, hub: HubOptions
) -> dict[str, Any]:
    """Those that differ from the defaults; None for all others."""
    from cluster.recipe import PATHS, anchored
    from cluster.recipe_model import recipe_options

    base, adapters = named_by(words, asked.access)
    entries = [parse_adapter(adapter) for adapter in adapters]
    given = {**asdict(asked), **asdict(run), **asdict(hub)}
    options = {
        option.name: None if given[option.name] == option.default else given[option.name]
        for option in recipe_options()
    }
    for name in PATHS:
        if options[name] is not None:
            options[name] = anchored(str(options[name]), Path.cwd(), name)
    return {
        "base": None if base is None else str(locate(base)),
        "adapters": [{"path": str(place), "weight": weight} for place, weight in entries],
        **options,
    }

"""The words of a merge that is to run elsewhere: checked by the command's own parser, and named.

No input is read: the paths in the words are those of the cluster. A recipe is one of this machine,
so its options are sent as words.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import typer

from cluster.hub_options import HubOptions
from cluster.option_groups import options_of
from cluster.options import size_in_bytes
from cluster.plan_options import PlanOptions
from cluster.run_options import RunOptions
from cluster.words import is_recipe, named_by
from merge_core.adapter import AdapterWord, parse_adapter
from merge_core.errors import InputError, Problem, gathered
from merge_core.stores.location import Place, is_bare_hub_id

SPEED = frozenset(
    {
        "address", "workers", "cpu_workers", "gpus_per_worker", "start_timeout", "device",
        "verify", "overwrite", "layers", "as_json", "quiet", "debug", "endpoint_url", "region",
        "anonymous", "cache", "state", "public", "scratch", "scratch_limit",
    }
)  # fmt: skip
"""Options of a merge that change no byte of its result. All others belong to the recipe: an option
that is missing here makes a merge look new, which is better than to take it for another."""

_GROUPS = (PlanOptions, RunOptions, HubOptions)

_SCHEME = re.compile(r"[a-z][a-z0-9+]*:/")


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeWords:
    """A merge as it was written, and the part of a job's name that tells it from other merges."""

    words: tuple[str, ...]
    """From ``merge`` on."""
    recipe: str
    """12 hexadecimal digits of a digest over what is merged where."""


def parse_merge(words: Sequence[str], context: typer.Context) -> typer.Context:
    """Have the merge command itself take the words apart.

    Args:
        words: from ``merge`` on.
        context: of the command that they were given to.

    Raises:
        typer's UsageError: they are no merge, or not one that could run on a cluster. It ends a
            command with exit code 2 and the usage.
    """
    if words[0] != "merge":
        raise typer.BadParameter(f"{words[0]!r} cannot run as a job; merge can")
    commands: Any = context.find_root().command
    merge: Any = commands.get_command(context, "merge")
    parsed: typer.Context = merge.make_context("raymeld submit -- merge", list(words[1:]))
    source = parsed.get_parameter_source("address")
    if source is not None and source.name == "COMMANDLINE":
        told = "the driver runs on the cluster that submit's own --address names, and uses that"
        raise typer.BadParameter(f"--address cannot stand behind merge: {told}")
    return parsed


def read_merge(words: Sequence[str], parsed: typer.Context) -> MergeWords:
    """Check the values, as far as that goes without the files.

    Raises:
        InputError: with all that is wrong.
    """
    problems: list[Problem] = []
    with gathered(problems):
        size_in_bytes(parsed.params["shard_size"])
    with gathered(problems):
        size_in_bytes(parsed.params["scratch_limit"] or "0", "--scratch-limit")
    with gathered(problems):
        if is_recipe(parsed.params["words"][0]):
            parsed.params["words"] = _words_of(*named_by(parsed.params["words"]))
            words = unfolded(parsed.params)
    named = _named(parsed.params)
    problems += [_relative(n, path) for n, path in _paths(named) if _is_relative(path)]
    if problems:
        raise InputError(problems)
    return MergeWords(words=tuple(words), recipe=recipe_digest(named))


def unfolded(parameters: Mapping[str, Any]) -> list[str]:
    """The words of a merge whose recipe is on this machine alone, its options as flags.

    Its address is left out: a job runs on the cluster that it is submitted to.
    """
    words = ["merge", *parameters["words"]]
    for option in (one for group in _GROUPS for one in options_of(group)):
        value = parameters[option.name]
        if option.name != "address" and value != option.default:
            words += [option.flag] if value is True else [option.flag, str(value)]
    own = {"overwrite": "--overwrite", "as_json": "--json", "quiet": "--quiet", "debug": "--debug"}
    return words + [flag for name, flag in own.items() if parameters[name]]


def _words_of(base: Place | None, adapters: Sequence[AdapterWord]) -> list[str]:
    words = [] if base is None else [str(base)]
    for place, weight in map(parse_adapter, adapters):
        plain = weight == 1 and "@" not in str(place)  # a revision could pass for a weight
        words.append(str(place) if plain else f"{place}@{weight!r}")
    return words


def _named(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """With the first of several words as base, as far as words alone can tell."""
    others = dict(parameters)
    first, *adapters = others.pop("words")
    if not adapters:
        return {**others, "adapters": [first]}
    return {**others, "base": first, "adapters": adapters}


def recipe_digest(parameters: Mapping[str, Any]) -> str:
    """The same for the same base, adapters, OUT and byte-changing options, however fast they run.

    Everything counts as it was written: no path is resolved, and 1000MB is not 1GB. What was not
    given does not count, nor does a flag that is off, so that an option that is new changes no
    name.
    """
    said = {
        name: [str(part) for part in value] if isinstance(value, list | tuple) else str(value)
        for name, value in parameters.items()
        if name not in SPEED and value is not None and value is not False
    }
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:12]


def _paths(parameters: Mapping[str, Any]) -> list[tuple[str, str]]:
    names = ("base", "out", "device_map", "state", "scratch")
    single = [(name, str(parameters[name])) for name in names if parameters.get(name)]
    tokenizer = parameters["tokenizer"]
    if tokenizer not in (None, "base"):
        single.append(("tokenizer", tokenizer))
    return [*single, *(("adapters", adapter) for adapter in parameters["adapters"])]


def _is_relative(path: str) -> bool:
    return not path.startswith("/") and _SCHEME.match(path) is None


def _relative(name: str, path: str) -> Problem:
    """What is wrong with a word that starts nowhere.

    ``org/name`` is refused as well, though a merge on this machine takes it for a model on the hub:
    it does so where no such path exists, and this machine knows nothing of the cluster's paths. A
    path that was meant there must not become a download.
    """
    what = f"{path!r} is relative: on the cluster, to whatever directory Ray was started in"
    hub = path if name != "out" and is_bare_hub_id(path) else "org/name"
    remedy = f"Give the path from / on, as the cluster's nodes have it; hf://{hub} is the hub"
    return Problem(what, name.upper(), remedy)

"""``--layers``: a merge in stages, each of which makes some of the result's files.

A stage makes the files that hold any of the layers it names; what lies in none of them is deferred.
OUT becomes a checkpoint with the stage after which no file is missing, and then it has the same
bytes as if all had been merged at once.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence

from merge_core.errors import refuse
from merge_core.plan import MergePlan, Shard
from merge_core.shards import layer_of

REST = "rest"
"""What belongs to no layer: embeddings, final norm and head."""

_RANGE = re.compile(r"(\d{1,5})(?:-(\d{1,5}))?")


def shards_of(shards: Sequence[Shard], layers: str | None) -> frozenset[int]:
    """Those that a stage makes, by their index; all of them where it names no layers.

    Args:
        layers: such as ``0-39``, ``40-79,rest``.

    Raises:
        InputError: it is no such list, or names layers that the result does not have.
    """
    if layers is None:
        return frozenset(shard.index for shard in shards)
    wanted = _parse(layers)
    held = {shard.index: _layers_in(shard) for shard in shards}
    there = frozenset().union(*held.values())
    strange = wanted - there
    if strange:
        what = f"the result has no {_listed(strange)}"
        raise refuse(what, "--layers", f"It has {_listed(there)}")
    return frozenset(index for index, mine in held.items() if mine & wanted)


def check_layers(layers: str) -> None:
    """Make sure that it is a list of layers, whichever there are.

    Raises:
        InputError: it is none.
    """
    _parse(layers)


def layers_of(plan: MergePlan, shards: Collection[int]) -> str:
    """The layers that lie in some shards, as ``--layers`` takes them."""
    return _spelled(frozenset().union(*(_layers_in(plan.shards[index]) for index in shards)))


def layers_among(names: Iterable[str]) -> str:
    """The layers that some tensors belong to, as ``--layers`` takes them."""
    return _spelled(_layers_among(names))


def _layers_in(shard: Shard) -> frozenset[int]:
    """Numbers of the layers in a shard; -1 is the rest."""
    return _layers_among(task.target.name for task in shard.tasks)


def _layers_among(names: Iterable[str]) -> frozenset[int]:
    return frozenset(-1 if layer is None else layer for layer in map(layer_of, names))


def _parse(text: str) -> frozenset[int]:
    wanted: set[int] = set()
    for part in text.split(","):
        match = _RANGE.fullmatch(part.strip())
        if part.strip() == REST:
            wanted.add(-1)
        elif match is None or int(match[2] or match[1]) < int(match[1]):
            what = f"{part!r} names no layers"
            raise refuse(what, "--layers", "Give numbers and ranges such as 0-39,42, or rest")
        else:
            wanted |= set(range(int(match[1]), int(match[2] or match[1]) + 1))
    return frozenset(wanted)


def _listed(layers: Collection[int]) -> str:
    numbers = [layer for layer in layers if layer >= 0]
    return f"{'layers ' * bool(numbers)}{_spelled(layers)}"


def _spelled(layers: Collection[int]) -> str:
    runs: list[list[int]] = []
    for layer in sorted(layer for layer in layers if layer >= 0):
        if runs and runs[-1][1] == layer - 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    parts = [f"{a}-{b}" if a < b else f"{a}" for a, b in runs]
    return ",".join([*parts, *[REST] * (-1 in layers)])

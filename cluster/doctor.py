"""``raymeld doctor``: examines this machine or every node of a cluster, and changes nothing."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from actors.examiner import ExaminedNode, examine_here
from actors.identity import Identity, identify
from actors.libraries import Library, find_libraries
from cluster.session import session
from merge_core.adapter import parse_adapter
from merge_core.errors import InputError, Problem, StorageError
from merge_core.output import check_destination
from merge_core.plan import MergePlan
from merge_core.planner import make_plan
from merge_core.reachable import InputSight, look_at_input, nearest_directory, trial_directory

INLINE = "inline"
"""The address that means: this process, no Ray."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Intent:
    """The merge that somebody has in mind, as far as they told."""

    base: Path | None
    adapters: Sequence[str]
    """As they were written, with weights."""
    out: Path | None

    @property
    def inputs(self) -> list[Path]:
        """Directories to read from, BASE first."""
        adapters = (parse_adapter(text)[0].absolute() for text in self.adapters)
        return [*([self.base] if self.base else []), *adapters]


@dataclass(frozen=True, slots=True, kw_only=True)
class Destination:
    """What the driver found where OUT is, or would be made."""

    out: Path
    place: Path | None = None
    """The directory in which it lies; None: there is none that may be looked at."""
    free: int | None = None
    """Bytes, of that directory's file system."""
    refusal: Problem | None = None
    """Why the driver cannot write there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkup:
    """Everything that was found, before anybody judges it."""

    address: str
    driver: Identity
    libraries: tuple[Library, ...]
    """Of the driver."""
    token: bool | None
    """Whether the cluster is sent one; None without a cluster."""
    inputs: tuple[InputSight, ...]
    """As the driver sees them, BASE first."""
    destination: Destination | None
    nodes: tuple[ExaminedNode, ...]
    """Of the cluster; without one, this machine alone."""
    plan: MergePlan | None
    refusals: tuple[Problem, ...]
    """Of the plan, and of OUT for this plan."""

    @property
    def on_ray(self) -> bool:
        """Whether a cluster was examined."""
        return self.address != INLINE


def examine(address: str, intent: Intent, *, seconds: float, say: Callable[[str], None]) -> Checkup:
    """Examine what a merge would meet.

    Args:
        address: as for a merge.
        seconds: that a node may take for an answer.
        say: called with what is being done.

    Raises:
        RaymeldError: the cluster cannot be reached, or Ray does not start.
    """
    inputs, token = intent.inputs, None
    sights = tuple(look_at_input(path) for path in inputs)
    with _destination(intent.out) as (destination, trial):
        if address == INLINE:
            nodes = [examine_here(inputs, trial)]
        else:
            say(f"connecting to {address}")
            with session(address, use_gpus=True):
                from actors.rounds import examine_nodes

                token = os.environ.get("RAY_AUTH_MODE") == "token"
                nodes = examine_nodes(inputs, trial, seconds)
    plan: MergePlan | None = None
    refusals: list[Problem] = []
    if intent.adapters and not any(sight.error for sight in sights):
        plan, refusals = _plan(intent)
    return Checkup(
        address=address,
        driver=identify(),
        libraries=find_libraries(),
        token=token,
        inputs=sights,
        destination=destination,
        nodes=tuple(nodes),
        plan=plan,
        refusals=tuple(refusals),
    )


@contextlib.contextmanager
def _destination(out: Path | None) -> Iterator[tuple[Destination | None, Path | None]]:
    """What is there, and a directory in it for all nodes to write into, if one can be made."""
    if out is None:
        yield None, None
        return
    with contextlib.ExitStack() as stack:
        place = free = trial = refusal = None
        try:
            place = nearest_directory(out)
            free = shutil.disk_usage(place).free
            trial = stack.enter_context(trial_directory(place))
        except StorageError as error:
            refusal = Problem(error.what, error.where, error.remedy)
        yield Destination(out=out, place=place, free=free, refusal=refusal), trial


def _plan(intent: Intent) -> tuple[MergePlan | None, list[Problem]]:
    """The plan, if there can be one, and what stands against it."""
    assert intent.base is not None
    plan = None
    try:
        plan = make_plan(intent.base, intent.adapters)
        if intent.out is not None:
            check_destination(intent.out, plan)
    except InputError as error:
        return plan, list(error.problems)
    except StorageError as error:
        return plan, [Problem(error.what, error.where, error.remedy)]
    return plan, []

"""``raymeld doctor``: examines this machine or every node of a cluster, and changes nothing."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from actors.examiner import ExaminedNode, examine_here
from actors.identity import Identity, identify
from actors.libraries import Library, find_libraries
from cluster.session import session
from merge_core.adapter import parse_adapter
from merge_core.background import in_background
from merge_core.destination import check_access, check_destination, check_ownership, notes_on
from merge_core.errors import InputError, Problem, StorageError
from merge_core.plan import MergePlan
from merge_core.planner import make_plan
from merge_core.reachable import InputSight, look_at_input, nearest_directory, trial_directory
from merge_core.stores.location import DEFAULT_ACCESS, Access, Location
from merge_core.stores.opening import open_store
from merge_core.upload import check_account, check_upload, kept_in, lacks_state

INLINE = "inline"
"""The address that means: this process, no Ray."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Intent:
    """The merge that somebody has in mind, as far as they told."""

    base: Location | None
    adapters: Sequence[str]
    """As they were written, with weights."""
    out: Location | None
    access: Access = DEFAULT_ACCESS
    """How the adapters are reached, where they lie in a store."""

    @property
    def inputs(self) -> list[Location]:
        """Directories to read from, BASE first."""
        adapters = (parse_adapter(text, self.access)[0] for text in self.adapters)
        return [*([self.base] if self.base else []), *adapters]

    @property
    def paths(self) -> list[Location]:
        """All of it."""
        return [*self.inputs, *([self.out] if self.out else [])]


@dataclass(frozen=True, slots=True, kw_only=True)
class Destination:
    """What the driver found where OUT is, or would be made."""

    out: Location
    place: Location | None = None
    """The directory in which it lies, or the state of a merge to the hub; None: there is none that
    may be looked at."""
    free: int | None = None
    """Bytes, of that directory's file system."""
    refusal: Problem | None = None
    """Why the driver cannot write there."""

    @property
    def named(self) -> str:
        """What is written to by every node."""
        return f"OUT {self.out}" if self.out.upload is None else f"STATE {self.out.upload.state}"


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
    notes: tuple[Problem, ...] = ()
    """On what lies in OUT."""

    @property
    def on_ray(self) -> bool:
        """Whether a cluster was examined."""
        return self.address != INLINE


def examine(address: str, intent: Intent, *, seconds: float, say: Callable[[str], None]) -> Checkup:
    """Examine what a merge would meet.

    Args:
        address: as for a merge.
        seconds: that a node, this machine's paths among them, may take for an answer.
        say: called with what is being done.

    Raises:
        RaymeldError: the cluster cannot be reached, or Ray does not start.
    """
    if intent.paths:
        say(f"looking at {', '.join(map(str, intent.paths))}")
    sights, token = _look(intent.inputs, seconds), None
    upload = intent.out.upload if intent.out is not None else None
    with _destination(intent.out, seconds) as (destination, trial):
        if address == INLINE:
            nodes = [examine_here(sights, trial, upload)]
        else:
            say(f"connecting to {address}")
            with session(address, use_gpus=True):
                from actors.rounds import examine_nodes

                token = os.environ.get("RAY_AUTH_MODE") == "token"
                nodes = examine_nodes(intent.inputs, trial, upload, seconds)
    plan: MergePlan | None = None
    refusals: list[Problem] = []
    if intent.adapters and not any(sight.error for sight in sights):
        plan, refusals = _plan(intent, destination)
    notes = _look_into(destination, plan, refusals) if destination else []
    if trial is not None and _is_left(trial):
        notes.append(Problem("could not be removed", str(trial), "Remove it: it is of no use"))
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
        notes=tuple(notes),
    )


def _is_left(trial: Location) -> bool:
    if trial.is_local:
        return trial.local.exists()
    return next(open_store(trial).list(), None) is not None


def _look(inputs: Sequence[Location], seconds: float) -> tuple[InputSight, ...]:
    """At all of them at once, as each node does."""
    looks = [in_background(partial(look_at_input, path)) for path in inputs]
    found = []
    for path, look in zip(inputs, looks, strict=True):
        try:
            found.append(look.result(seconds))
        except TimeoutError:
            found.append(InputSight(path=path, files=(), error=_hangs(seconds)))
    return tuple(found)


def _hangs(seconds: float) -> str:
    return f"no answer within {seconds:g} s, as of a mount whose server is gone"


@contextlib.contextmanager
def _destination(
    out: Location | None, seconds: float
) -> Iterator[tuple[Destination | None, Location | None]]:
    """What is there, and a directory in it for all nodes to write into, if one can be made."""
    if out is None:
        yield None, None
        return
    with contextlib.ExitStack() as stack:
        place = free = trial = None
        refusal = next(iter((*lacks_state(out), *check_access(out))), None)
        if refusal is not None:
            yield Destination(out=out, refusal=refusal), None
            return
        try:
            place = in_background(partial(nearest_directory, kept_in(out))).result(seconds)
            free = shutil.disk_usage(place.local).free if place.is_local else None
            trial = stack.enter_context(trial_directory(place))
        except StorageError as error:
            refusal = Problem(error.what, error.where, error.remedy)
        except TimeoutError:
            refusal = Problem(_hangs(seconds), str(out), "Try ls there")
        yield Destination(out=out, place=place, free=free, refusal=refusal), trial


def _plan(
    intent: Intent, destination: Destination | None
) -> tuple[MergePlan | None, list[Problem]]:
    """The plan, if there can be one, and what stands against it."""
    assert intent.base is not None
    plan = None
    try:
        plan = make_plan(intent.base, intent.adapters, access=intent.access)
        if destination is not None and destination.refusal is None:  # or it may hang
            check_destination(destination.out, plan)
    except InputError as error:
        return plan, list(error.problems)
    except StorageError as error:
        return plan, [Problem(error.what, error.where, error.remedy)]
    return plan, []


def _look_into(
    destination: Destination, plan: MergePlan | None, refusals: list[Problem]
) -> list[Problem]:
    """What lies in OUT that a merge would stop at; what every merge stops at is a refusal, if a
    plan has not led to it.
    """
    if destination.refusal is not None:
        return []
    out, notes = destination.out, list[Problem]()
    looks: list[Callable[[], object]] = [lambda: notes.extend(notes_on(out))]
    if out.upload is not None:
        looks.append(lambda: check_account(out))
    if plan is None:
        looks.append(lambda: refusals.extend(check_upload(out, None)))
    if not refusals:
        looks.append(lambda: check_ownership(out))
    for look in looks:
        try:
            look()
        except InputError as error:
            refusals += error.problems
        except StorageError as error:
            refusals.append(Problem(error.what, error.where, error.remedy))
    return notes

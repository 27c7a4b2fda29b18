"""The rounds of an examination: an examiner on every node, none of which can hold up the others.

Examiners ask for no CPU, so that a busy cluster makes room for them; those that look at GPUs take
only GPUs that are free.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.draining import draining_nodes
from actors.examiner import Examination, ExaminedNode, Examiner, Silence
from actors.identity import Identity, identify, signer, unsigned
from actors.ray_errors import cause_of, first_line
from merge_core.reachable import token_arrived
from merge_core.stores.location import Location, Upload


def examine_nodes(
    inputs: Sequence[Location], trial: Location | None, upload: Upload | None, seconds: float
) -> list[ExaminedNode]:
    """Every live node of the connected cluster, by name.

    Args:
        inputs: folders that a merge reads.
        trial: a folder that this process made beside OUT; see ``reachable``.
        upload: how a merge would get onto the hub, if it goes there.
        seconds: that a node may take for each of its answers.
    """
    nodes = _live_nodes()
    staying = [node for node, one in nodes.items() if one.leaves_in is None]
    with _examiners(staying) as examiners:
        said, driver, up = _ask(examiners, "examine", seconds), identify(), {}
        for node, examiner, answer in zip(staying, examiners, said, strict=True):
            found = read_examination(answer, driver)
            nodes[node] = replace(nodes[node], examination=found)
            if isinstance(found, Examination):
                up[node] = examiner
        if inputs or trial is not None or upload is not None:
            said = _ask(list(up.values()), "look", seconds, inputs, trial, upload)
            for node, answer in zip(up, said, strict=True):
                arrived = trial is None or token_arrived(trial, node)
                nodes[node] = replace(nodes[node], paths=answer, arrived=arrived)
    for node, one in _with_views({node: nodes[node] for node in up}, seconds):
        nodes[node] = one
    return sorted(nodes.values(), key=lambda one: one.name)


def read_examination(answer: Any, driver: Identity) -> Examination | Identity | Silence:
    """What an examiner answered, as far as ``driver`` can read it: where the code is another, who
    answered is all that it understands.
    """
    if isinstance(answer, Silence):
        return answer
    identity = signer(answer)
    if identity.code_difference(driver):
        return identity
    found: Examination = unsigned(answer)
    return found


def _live_nodes() -> dict[str, ExaminedNode]:
    """By Ray's ids; two on one machine bear a piece of them in their names."""
    alive = [node for node in ray.nodes() if node["Alive"]]
    leaving = draining_nodes()
    hosts = Counter(node["NodeManagerHostname"] for node in alive)
    found = {}
    for node in alive:
        host, number = node["NodeManagerHostname"], node["NodeID"]
        found[number] = ExaminedNode(
            name=host if hosts[host] == 1 else f"{host}/{number[:6]}",
            ray_cpus=int(node["Resources"].get("CPU", 0)),
            ray_gpus=int(node["Resources"].get("GPU", 0)),
            leaves_in=leaving[number] - time.time() if number in leaving else None,
        )
    return found


def _with_views(
    nodes: dict[str, ExaminedNode], seconds: float
) -> Iterator[tuple[str, ExaminedNode]]:
    """What a worker sees that was given a GPU, for every GPU that is free.

    Not even asked for where they are taken: it would wait, and an autoscaler might start a node.
    """
    free = ray._private.state.available_resources_per_node()  # noqa: SLF001 - no public way
    numbers = {node: int(free.get(node, {}).get("GPU", 0)) for node in nodes}
    places = [node for node, number in numbers.items() for _ in range(number)]
    said = view_gpus(places, seconds)
    for node, one in nodes.items():
        views = tuple(view for place, view in zip(places, said, strict=True) if place == node)
        yield node, replace(one, taken=one.ray_gpus - numbers[node], views=views)


def view_gpus(places: Sequence[str], seconds: float) -> list[Any]:
    """What a worker on each of these nodes sees that was given a GPU; a Silence where none came up.

    Args:
        places: by Ray's ids, which may name a node several times.
        seconds: that all of them may take.
    """
    taken = Silence(reason="it was taken meanwhile", kind="waiting")
    with _examiners(places, num_gpus=1) as examiners:
        said = _ask(examiners, "view_devices", seconds)
        return [
            taken if isinstance(view, Silence) and _is_waiting(examiner) else view
            for examiner, view in zip(examiners, said, strict=True)
        ]


def _is_waiting(examiner: Any) -> bool:
    """Whether Ray has not placed it yet."""
    found = ray._private.state.actors(examiner._actor_id.hex())  # noqa: SLF001 - no public way
    return bool(found.get("State") == "PENDING_CREATION")


@contextlib.contextmanager
def _examiners(nodes: Sequence[str], num_gpus: int = 0) -> Iterator[list[Any]]:
    """One for each of ``nodes``, which may name a node several times."""
    remote = ray.remote(num_cpus=0, num_gpus=num_gpus, max_restarts=0, max_task_retries=0)(Examiner)
    places = [NodeAffinitySchedulingStrategy(node, soft=False) for node in nodes]
    started = [
        remote.options(scheduling_strategy=place).remote(node)
        for node, place in zip(nodes, places, strict=True)
    ]
    try:
        yield started
    finally:
        for examiner in started:
            with contextlib.suppress(Exception):  # Ray may be gone already
                ray.kill(examiner)


def _ask(examiners: Sequence[Any], method: str, seconds: float, *arguments: Any) -> list[Any]:
    """What each of them answers; a Silence where one does not."""
    if not examiners:
        return []
    asked = [getattr(examiner, method).remote(*arguments) for examiner in examiners]
    ready, _ = ray.wait(asked, num_returns=len(asked), timeout=seconds)
    late = Silence(reason=f"no answer within {seconds:g} s", kind="late")
    return [_answer(ref) if ref in ready else late for ref in asked]


def _answer(ref: Any) -> Any:
    try:
        return ray.get(ref)
    except RayTaskError as error:
        return Silence(reason=first_line(cause_of(error)), kind="raised")
    except RayError as error:
        raised = getattr(error, "actor_init_failed", False)
        return Silence(reason=first_line(error), kind="raised" if raised else "died")

"""The pool: starts workers, gives them work, and turns what Ray raises into events.

This is the only place where Ray's exceptions about workers are known. It decides nothing: what to
start and what to retry is the schedule's business.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import OutOfMemoryError, RayError, RayTaskError

from actors.checker import Checker
from actors.draining import Draining
from actors.events import (
    Event,
    ItemDone,
    ItemFailed,
    WorkerDraining,
    WorkerLost,
    WorkerReady,
    WorkerStartFailed,
    WorkerUnfit,
)
from actors.greeting import Greeting
from actors.identity import SAME_CODE, Identity, Signed, signer, unsigned
from actors.lifeline import Lifeline
from actors.ray_errors import cause_of, first_line
from merge_core.errors import (
    DeviceMemoryError,
    InputError,
    NonFiniteError,
    RaymeldError,
    counted,
    refuse,
)

_HOPELESS = (NonFiniteError, InputError)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerOptions:
    """What every worker of one kind is started with."""

    device: str
    """``cuda`` or ``cpu``; also the name of the kind."""
    resources: Mapping[str, float]
    """Ray's ``num_cpus`` and ``num_gpus``."""


@dataclass(slots=True, eq=False)
class _Slot:
    actor: Any
    kind: str
    item: int | None = None
    greeting: Greeting | None = None
    answered: bool = False
    """With a greeting, or that it is of no use where it is."""


class Pool:
    """Workers of every kind.

    Args:
        driver: whose code the workers must have.
        kinds: of worker, by device.
        worker: the class of their actors; called with device, name and ``arguments``.
        arguments: sent once to each node, however many workers it has.
    """

    def __init__(
        self,
        driver: Identity,
        kinds: Sequence[WorkerOptions],
        worker: type[Checker],
        arguments: Sequence[Any] = (),
    ) -> None:
        self._driver = driver
        self._lifeline = Lifeline.of_this_driver()
        self._arguments = [ray.put(argument) for argument in arguments]
        self._classes = {kind.device: remote_worker(worker, kind.resources) for kind in kinds}
        self._slots: dict[int, _Slot] = {}
        self._refs: dict[Any, int] = {}
        self._due: list[tuple[float, int, str]] = []
        self._draining = Draining()

    @property
    def greetings(self) -> dict[int, Greeting]:
        """What each live worker said first."""
        return {n: slot.greeting for n, slot in self._slots.items() if slot.greeting is not None}

    @property
    def assigned(self) -> dict[int, int]:
        """The item that each worker is at."""
        return {n: slot.item for n, slot in self._slots.items() if slot.item is not None}

    def count(self, kind: str) -> tuple[int, int]:
        """Workers of a kind that have come up, and those that were asked for and have not."""
        slots = [slot for slot in self._slots.values() if slot.kind == kind]
        due = sum(kind == other for _, _, other in self._due)
        up = sum(slot.greeting is not None for slot in slots)
        return up, due + sum(not slot.answered for slot in slots)

    def start(self, worker: int, kind: str, delay: float) -> None:
        """Start a worker after ``delay`` seconds; an event says how that went."""
        self._due.append((time.monotonic() + delay, worker, kind))

    def assign(self, worker: int, item: int, method: str, *args: Any) -> None:
        """Call ``method`` of a worker; ItemDone, ItemFailed or WorkerLost follows."""
        slot = self._slots[worker]
        slot.item = item
        self._refs[getattr(slot.actor, method).remote(*args)] = worker

    def next_events(self, timeout: float) -> list[Event]:
        """What happened, waiting at most ``timeout`` seconds for the first of it.

        Raises:
            InputError: a worker runs other code than the driver.
            RaymeldError: the cluster is gone.
        """
        self._lifeline.look()
        self._start_due()
        if not self._refs:
            time.sleep(timeout if self._due else 0)
            return []
        refs = list(self._refs)
        ready, _ = ray.wait(refs, num_returns=len(refs), timeout=0)  # the cheaper of the two
        if not ready:
            ready, _ = ray.wait(refs, num_returns=1, timeout=timeout)
        return [self._event(ref) for ref in ready]

    def release(self, worker: int) -> None:
        """End a worker and forget what it was asked."""
        self._due = [due for due in self._due if due[1] != worker]
        if worker in self._slots:
            self._refs = {ref: other for ref, other in self._refs.items() if other != worker}
            self._fence(worker)

    def draining(self) -> list[WorkerDraining]:
        """The workers on nodes that are about to go."""
        left = self._draining.seconds_left
        return [
            WorkerDraining(worker=worker, seconds_left=left[greeting.node])
            for worker, greeting in self.greetings.items()
            if greeting.node in left
        ]

    def status(self) -> dict[int, tuple[str, str, int, int]]:
        """What each worker does; those that do not answer at once are left out."""
        asked = {self._slots[worker].actor.status.remote(): worker for worker in self.greetings}
        if not asked:
            return {}
        ready, _ = ray.wait(list(asked), num_returns=len(asked), timeout=0.5)
        answers = {}
        for ref in ready:
            with contextlib.suppress(RayError):  # it is dying; its call will say so
                answers[asked[ref]] = ray.get(ref)
        return answers

    def close(self) -> None:
        """Kill every worker."""
        self._draining.close()
        for worker in list(self._slots):
            self._fence(worker)
        self._refs.clear()

    def _start_due(self) -> None:
        now = time.monotonic()
        for _, worker, kind in [due for due in self._due if due[0] <= now]:
            actor = self._classes[kind].remote(kind, f"worker-{worker}", *self._arguments)
            self._slots[worker] = _Slot(actor, kind)
            self._refs[actor.hello.remote()] = worker
        self._due = [due for due in self._due if due[0] > now]

    def _event(self, ref: Any) -> Event:
        worker = self._refs.pop(ref)
        slot = self._slots[worker]
        item, slot.item, first = slot.item, None, not slot.answered
        try:
            result = ray.get(ref)
        except RayTaskError as error:
            cause = cause_of(error)
            if item is None:
                return self._cannot_begin(worker, cause)
            hopeless = isinstance(cause, _HOPELESS)
            return ItemFailed(worker=worker, item=item, error=cause, hopeless=hopeless)
        except RayError as error:
            self._fence(worker)
            if first:
                return WorkerStartFailed(worker=worker, reason=first_line(error))
            memory = isinstance(error, OutOfMemoryError)
            return WorkerLost(worker=worker, reason=first_line(error), out_of_memory=memory)
        if item is None:
            return self._greet(worker, slot, result)
        return ItemDone(worker=worker, item=item, result=result)

    def _cannot_begin(self, worker: int, cause: Exception) -> Event:
        if isinstance(cause, DeviceMemoryError):  # kept, or Ray would hand out this GPU again
            self._slots[worker].answered = True
            return WorkerUnfit(worker=worker, reason=cause.what)
        self._fence(worker)
        reason = f"{cause.where}: {cause.what}" if isinstance(cause, RaymeldError) else str(cause)
        return WorkerStartFailed(worker=worker, reason=reason, cause=cause)

    def _greet(self, worker: int, slot: _Slot, answer: Signed) -> Event:
        identity = signer(answer)
        difference = identity.difference(self._driver)
        if difference:
            raise refuse(difference, f"the worker on {identity.host}", SAME_CODE)
        greeting: Greeting = unsigned(answer)
        slot.greeting, slot.answered = greeting, True
        return WorkerReady(worker=worker, node=greeting.node, host=identity.host)

    def _fence(self, worker: int) -> None:
        """Make sure that a worker that is said to be gone is gone: it may only be unreachable."""
        slot = self._slots.pop(worker)
        with contextlib.suppress(Exception):  # Ray may be gone already
            ray.kill(slot.actor)


def remote_worker(worker: type[Checker], resources: Mapping[str, float]) -> Any:
    """An actor class that Ray neither restarts nor retries: the schedule decides."""
    return ray.remote(
        concurrency_groups={"control": 1}, max_restarts=0, max_task_retries=0, **resources
    )(worker)


def node_resources() -> list[dict[str, float]]:
    """CPUs and GPUs of each live node of the connected cluster."""
    return [dict(node["Resources"]) for node in ray.nodes() if node["Alive"]]


def launching() -> str:
    """What the autoscaler is doing about pending workers, in words; empty where there is none."""
    from ray.autoscaler.v2.sdk import get_cluster_status

    if not ray.is_initialized():  # asking would connect to whatever other Ray this machine runs
        return ""
    try:
        status = get_cluster_status(ray.get_runtime_context().gcs_address, timeout=5)
    except Exception:  # noqa: BLE001 - only talk depends on it, and it asks what may be restarting
        return ""
    pending = sum(launch.count for launch in status.pending_launches)
    failed = sum(launch.count for launch in status.failed_launches)
    said = [f"{counted(pending, 'node')} launching"] * bool(pending)
    if failed:
        why = status.failed_launches[-1].details
        said.append(f"{counted(failed, 'node')} failed to launch, the last: {why}")
    return "; ".join(said)

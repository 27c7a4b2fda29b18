"""The pool: starts actors, gives them work, and turns what Ray raises into events.

This is the only place that knows Ray's exceptions. It decides nothing: what to start and what to
retry is the schedule's business.
"""

from __future__ import annotations

import contextlib
import math
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import OutOfMemoryError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.collector import Collector
from actors.events import (
    Event,
    ItemDone,
    ItemFailed,
    WorkerDraining,
    WorkerLost,
    WorkerReady,
    WorkerStartFailed,
)
from actors.identity import Identity
from actors.merger import Merger, remote_merger
from merge_core.errors import InputError, NonFiniteError, RaymeldError, counted, refuse
from merge_core.plan import MergePlan

COLLECTOR_STARTS = 3
"""Collectors that may die in a row over one call: more means that the call kills them."""

_COLOUR = re.compile("\x1b\\[[0-9;]*m")
"""Ray colours its messages, whoever reads them."""

_HOPELESS = (NonFiniteError, InputError)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerOptions:
    """What every worker of a pool is started with."""

    device: str
    """``cuda`` or ``cpu``."""
    resources: Mapping[str, float]
    """Ray's ``num_cpus`` and ``num_gpus``."""


@dataclass(slots=True, eq=False)
class _Slot:
    actor: Any
    item: int | None = None
    lanes: str = ""
    node: str = ""


class Pool:
    """Workers of one kind, and the collector beside the driver."""

    def __init__(
        self,
        plan: MergePlan,
        out: Path,
        run: str,
        driver: Identity,
        options: WorkerOptions,
        merger: type[Merger] = Merger,
        collector: type[Collector] = Collector,
    ) -> None:
        self._out, self._run, self._driver, self._options = out, run, driver, options
        self._plan = ray.put(plan)  # once; workers fetch it, calls name shards by number
        self._merger = remote_merger(merger, **options.resources)
        self._collector_class = collector
        self._collector: Any = None
        self._slots: dict[int, _Slot] = {}
        self._refs: dict[Any, int] = {}
        self._due: list[tuple[float, int]] = []
        self.log: list[str] = []
        """What the pool had to do by itself."""

    @property
    def lanes(self) -> dict[int, str]:
        """What each live worker chose, and why."""
        return {worker: slot.lanes for worker, slot in self._slots.items() if slot.lanes}

    @property
    def pending(self) -> int:
        """Workers that were asked for and have not come up."""
        return len(self._due) + sum(not slot.lanes for slot in self._slots.values())

    def start(self, worker: int, delay: float) -> None:
        """Start a worker after ``delay`` seconds; WorkerReady or WorkerStartFailed follows."""
        self._due.append((time.monotonic() + delay, worker))

    def assign(self, worker: int, item: int, method: str, *args: Any) -> None:
        """Call ``method`` of a worker; ItemDone, ItemFailed or WorkerLost follows."""
        slot = self._slots[worker]
        slot.item = item
        self._refs[getattr(slot.actor, method).remote(*args)] = worker

    def next_events(self, timeout: float) -> list[Event]:
        """What happened, waiting at most ``timeout`` seconds for the first of it.

        Raises:
            InputError: a worker runs other code than the driver.
        """
        self._start_due()
        if not self._refs:
            time.sleep(timeout if self._due else 0)
            return []
        ready, _ = ray.wait(list(self._refs), num_returns=1, timeout=timeout)
        if ready:  # and everything else that is there already
            ready, _ = ray.wait(list(self._refs), num_returns=len(self._refs), timeout=0)
        return [self._event(ref) for ref in ready]

    def release(self, worker: int) -> None:
        """End a worker and forget what it was asked."""
        self._due = [(due, other) for due, other in self._due if other != worker]
        if worker in self._slots:
            self._refs = {ref: other for ref, other in self._refs.items() if other != worker}
            self._fence(worker)

    def draining(self) -> list[WorkerDraining]:
        """The workers on nodes that are about to go: drained by hand, by a spot notice, by SIGTERM
        or by an autoscaler.
        """
        from ray._private.state import state  # what Ray Train asks; there is no public way

        deadlines = state.get_draining_nodes()
        return [
            WorkerDraining(worker=number, seconds_left=_seconds_until(deadlines[slot.node]))
            for number, slot in self._slots.items()
            if slot.node in deadlines
        ]

    def status(self) -> dict[int, tuple[str, str, int, int]]:
        """What each worker does; those that do not answer at once are left out."""
        asked = {slot.actor.status.remote(): n for n, slot in self._slots.items() if slot.lanes}
        if not asked:
            return {}
        ready, _ = ray.wait(list(asked), num_returns=len(asked), timeout=0.5)
        answers = {}
        for ref in ready:
            with contextlib.suppress(RayError):  # it is dying; its call will say so
                answers[asked[ref]] = ray.get(ref)
        return answers

    def collect(self, method: str, *args: Any) -> Any:
        """Call the collector; if it dies, start another, which rebuilds itself, and call again.

        Raises:
            RaymeldError: what the collector raised, or that it died COLLECTOR_STARTS times.
        """
        last: Exception | None = None
        for _ in range(COLLECTOR_STARTS):
            if self._collector is None:
                self._collector = self._start_collector()
            try:
                return ray.get(getattr(self._collector, method).remote(*args))
            except RayTaskError as error:
                raise _cause(error) from None
            except RayError as error:
                ray.kill(self._collector)
                self._collector, last = None, error
                self.log.append(f"starting another collector in {method}: {_first_line(error)}")
        raise RaymeldError(
            f"the collector died {COLLECTOR_STARTS} times in {method}: {_first_line(last)}",
            str(self._out),
            "Look at the memory of the driver's machine.",
        )

    def close(self) -> None:
        """Kill every actor."""
        for actor in (*(slot.actor for slot in self._slots.values()), self._collector):
            if actor is not None:
                with contextlib.suppress(Exception):  # Ray may be gone already
                    ray.kill(actor)
        self._slots.clear()
        self._refs.clear()

    def _start_due(self) -> None:
        now = time.monotonic()
        for worker in [worker for due, worker in self._due if due <= now]:
            actor = self._merger.remote(
                self._plan, self._out, self._options.device, f"worker-{worker}"
            )
            self._slots[worker] = _Slot(actor)
            self._refs[actor.hello.remote()] = worker
        self._due = [(due, worker) for due, worker in self._due if due > now]

    def _start_collector(self) -> Any:
        """Beside the driver, without a CPU of its own: clusters may have none on the head."""
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        actor = ray.remote(num_cpus=0, max_restarts=0, max_task_retries=0)(self._collector_class)
        return actor.options(scheduling_strategy=here).remote(self._plan, self._out, self._run)

    def _event(self, ref: Any) -> Event:
        worker = self._refs.pop(ref)
        slot = self._slots[worker]
        item, slot.item = slot.item, None
        try:
            result = ray.get(ref)
        except RayTaskError as error:
            cause = _cause(error)
            if item is None:
                self._fence(worker)
                return WorkerStartFailed(worker=worker, reason=str(cause))
            hopeless = isinstance(cause, _HOPELESS)
            return ItemFailed(worker=worker, item=item, error=cause, hopeless=hopeless)
        except RayError as error:
            self._fence(worker)
            if item is None:
                return WorkerStartFailed(worker=worker, reason=_first_line(error))
            memory = isinstance(error, OutOfMemoryError)
            return WorkerLost(worker=worker, reason=_first_line(error), out_of_memory=memory)
        if item is None:
            return self._greet(worker, slot, result)
        return ItemDone(worker=worker, item=item, result=result)

    def _greet(self, worker: int, slot: _Slot, hello: tuple[Identity, str, str]) -> Event:
        identity, slot.lanes, slot.node = hello
        difference = identity.difference(self._driver)
        if difference:
            raise refuse(
                difference,
                f"worker on {identity.host}",
                "Install the same raymeld on every node, and start the cluster from a directory"
                " that holds no package named cluster, actors or merge_core",
            )
        return WorkerReady(worker=worker)

    def _fence(self, worker: int) -> None:
        """Make sure that a worker that is said to be gone is gone: it may only be unreachable."""
        slot = self._slots.pop(worker)
        with contextlib.suppress(Exception):
            ray.kill(slot.actor)


def _seconds_until(deadline: int) -> float:
    """From Ray's milliseconds since the epoch, of which 0 means never."""
    return deadline / 1000 - time.time() if deadline else math.inf


def node_resources() -> list[dict[str, float]]:
    """CPUs and GPUs of each live node of the connected cluster."""
    return [dict(node["Resources"]) for node in ray.nodes() if node["Alive"]]


def launching() -> str:
    """What the autoscaler is doing about pending workers, in words; empty where there is none."""
    from ray.autoscaler.v2.sdk import get_cluster_status

    try:
        status = get_cluster_status(ray.get_runtime_context().gcs_address, timeout=5)
    except Exception:  # noqa: BLE001 - only talk depends on it, and it asks what may be restarting
        return ""
    pending, failed = len(status.pending_launches), len(status.failed_launches)
    said = [f"{counted(pending, 'launch')} under way"] * bool(pending)
    if failed:
        why = status.failed_launches[-1].details
        said.append(f"{counted(failed, 'launch')} failed, the last: {why}")
    return "; ".join(said)


def _cause(error: RayTaskError) -> Exception:
    """The exception that the actor raised, as it was there."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, Exception) else RaymeldError(_first_line(error))


def _first_line(error: Exception | None) -> str:
    text = _COLOUR.sub("", str(error)).strip()
    return text.splitlines()[0] if text else type(error).__name__

"""A collector beside the driver that is replaced when it dies."""

from __future__ import annotations

import contextlib
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.collector import Collector
from actors.lifeline import Lifeline
from actors.ray_errors import cause_of, first_line
from merge_core.errors import RaymeldError
from merge_core.plan import MergePlan
from merge_core.stores.location import Location

STARTS = 3
"""Collectors that may die in a row over one call: more means that the call kills them."""

WAIT_SECONDS = 1.0
"""For an answer, until the driver looks whether its cluster is still there. The answer itself may
take any time: storage that stalls for hours may come back."""


class KeptCollector:
    """Calls a collector, whichever it is by now.

    Args:
        plan: sealed.
        out: where it collects.
        run: of the lease under which it writes.
        kind: its class.
    """

    def __init__(self, plan: MergePlan, out: Location, run: str, kind: type[Collector]) -> None:
        self._plan, self._out, self._run, self._kind = ray.put(plan), out, run, kind
        self._lifeline = Lifeline.of_this_driver()
        self._actor: Any = None
        self.log: list[str] = []
        """What had to be done."""

    def call(self, method: str, *args: Any) -> Any:
        """Call it; if it dies, start another, which rebuilds itself, and call again.

        Raises:
            RaymeldError: what the collector raised, that it died STARTS times, or that the cluster
                is gone.
        """
        last: Exception | None = None
        for _ in range(STARTS):
            if self._actor is None:
                self._actor = self._start()
            try:
                return self._answer(getattr(self._actor, method).remote(*args))
            except RayTaskError as error:
                raise cause_of(error) from None
            except RayError as error:
                self._lifeline.look_now()
                ray.kill(self._actor)
                self._actor, last = None, error
                self.log.append(f"starting another collector in {method}: {first_line(error)}")
        raise RaymeldError(
            f"the collector died {STARTS} times in {method}: {first_line(last)}",
            str(self._out),
            "Look at the memory of the driver's machine.",
        )

    def close(self) -> None:
        """Kill it."""
        if self._actor is not None:
            with contextlib.suppress(Exception):  # Ray may be gone already
                ray.kill(self._actor)

    def _answer(self, ref: Any) -> Any:
        while True:
            try:
                return ray.get(ref, timeout=WAIT_SECONDS)
            except GetTimeoutError:
                self._lifeline.look()

    def _start(self) -> Any:
        """Beside the driver, without a CPU of its own: clusters may have none on the head.

        It asks for one byte, because Ray puts an actor that asks for nothing on any node, whatever
        the strategy says: on a spot node, say, which then could not leave.
        """
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        actor = ray.remote(num_cpus=0, memory=1, max_restarts=0, max_task_retries=0)(self._kind)
        return actor.options(scheduling_strategy=here).remote(self._plan, self._out, self._run)

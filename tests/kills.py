"""Processes of a merge that die at a chosen call of a chosen function, once.

    python tests/kills.py '[{"victim": "driver", "place": "before cluster.driver:Pool"}]' merge ...

is ``raymeld merge ...`` with such deaths ahead of it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import itertools
import json
import os
import signal
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merge_core.errors import DeviceMemoryError

WORKER = (
    "before merge_core.worker:ShardWorker.__init__",
    "before merge_core.worker:ShardWorker.merge",
    "after merge_core.storage:PartFile.__init__",
    "after merge_core.storage:PartFile.write_small",
    "after merge_core.storage:PartFile.finish",
    "after merge_core.worker:ShardWorker.merge",
    "before actors.checker:check_file",
    "after actors.checker:check_file",
)
COLLECTOR = (
    "before merge_core.commit:Assembly.resume",
    "before merge_core.commit:Assembly.accept",
    "before merge_core.commit:Assembly._publish_shard",
    "after merge_core.commit:Assembly._publish_shard",
    "after merge_core.commit:Assembly.accept",
    "before merge_core.commit:Assembly.write_record",
    "before merge_core.commit:fold_ledger",
    "after merge_core.commit:fold_ledger",
    "before merge_core.commit:Assembly.publish",
    "before merge_core.commit:remove_leftovers",
    "after merge_core.commit:remove_leftovers",
)
DRIVER = (
    "before cluster.driver:claim",
    "before cluster.driver:Pool",
    "before actors.pool:Pool.assign",
    "before cluster.merging:Merging._accept",
    "after cluster.merging:Merging._accept",
    "before cluster.merging:Merging._say_proven",
    "before cluster.merging:Merging.verify",
    "after cluster.merging:verify",
    "before cluster.merging:Merging.publish",
    "after cluster.merging:Merging.publish",
)
MERGING = WORKER[1:6]
PLACES = {
    "worker": WORKER,
    "raylet": WORKER,
    "drain": WORKER,
    "memory": MERGING,
    "collector": COLLECTOR,
    "driver": DRIVER,
}
"""Where what may happen, in the order in which a merge comes past."""

DRAIN_SECONDS = 10.0


@dataclass(frozen=True, kw_only=True)
class Kill:
    """One death, or less than that."""

    victim: str
    """``worker``, ``collector`` or ``driver``: the process itself. ``raylet``: the one of the
    worker that comes to the place; ``drain``: its node is about to go; ``memory``: it has none."""
    place: str
    """``before`` or ``after``, a module, a function in it."""
    about: str = ""
    """Only when an argument of the call contains this."""
    call: int = 1
    """At which of these calls in one process."""
    mark: str = ""
    """A file that says that it has happened, and under which parent: whoever comes next lives."""

    @property
    def happened(self) -> bool:
        return Path(self.mark).exists()

    def arm(self) -> None:
        """Have this process die there."""
        when, _, place = self.place.partition(" ")
        module, _, path = place.partition(":")
        *owners, name = path.split(".")
        owner: Any = importlib.import_module(module)
        for each in owners:
            owner = getattr(owner, each)
        real, calls = getattr(owner, name), itertools.count(1)

        @functools.wraps(real)
        def call(*arguments: Any, **options: Any) -> Any:
            due = self.about in str(arguments) and next(calls) == self.call
            if due and when == "before":
                self._strike()
            result = real(*arguments, **options)
            if due and when == "after":
                self._strike()
            return result

        setattr(owner, name, call)

    def _strike(self) -> None:
        with contextlib.suppress(FileExistsError), open(self.mark, "x") as mark:
            mark.write(str(os.getppid()))
            mark.flush()
            match self.victim:
                case "drain":
                    drain(DRAIN_SECONDS)
                    return
                case "memory":
                    raise DeviceMemoryError("no room", "cpu")
                case "raylet":  # and the worker: a machine's processes vanish together
                    os.kill(os.getppid(), signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)


def drain(seconds: float) -> None:
    """A spot notice for this worker's node, as ``raymeld spot-notice`` passes it on."""
    import ray
    from ray.core.generated import autoscaler_pb2

    here = ray.get_runtime_context()
    reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    deadline = int((time.time() + seconds) * 1000)
    gcs = ray._raylet.GcsClient(address=here.gcs_address)
    gcs.drain_node(here.get_node_id(), reason, "spot", deadline)


def marked(kills: Iterable[Kill], directory: Path) -> list[Kill]:
    """The same, each with a mark of its own."""
    directory.mkdir(exist_ok=True)
    return [
        dataclasses.replace(kill, mark=str(directory / f"{number}-{kill.victim}"))
        for number, kill in enumerate(kills)
    ]


def classes(kills: Sequence[Kill]) -> dict[str, type]:
    """Actors that die so, as options of a merge."""
    from actors.collector import Collector  # here: a merge without Ray imports none of it
    from actors.merger import Merger

    class DyingMerger(Merger):
        def __init__(self, *arguments: Any) -> None:
            _arm(kills, "worker", "raylet", "drain", "memory")
            super().__init__(*arguments)

    class DyingCollector(Collector):
        def __init__(self, *arguments: Any) -> None:
            _arm(kills, "collector")
            super().__init__(*arguments)

    return {"merger": DyingMerger, "collector": DyingCollector}


def command(kills: Iterable[Kill], *words: object) -> list[str]:
    """``raymeld`` with these words and these deaths."""
    told = json.dumps([dataclasses.asdict(kill) for kill in kills])
    return [sys.executable, __file__, told, *map(str, words)]


def by_value() -> None:
    """Have Ray send this module's classes along instead of their names."""
    import kills
    import ray

    ray.cloudpickle.register_pickle_by_value(kills)


def _arm(kills: Sequence[Kill], *victims: str) -> None:
    for kill in kills:
        if kill.victim in victims and not kill.happened:
            kill.arm()


def _main(told: str, words: list[str]) -> None:
    from cluster import cli

    kills = [Kill(**fields) for fields in json.loads(told)]
    _arm(kills, "driver")
    if "inline" not in words:
        from cluster import workers

        workers.ClusterOptions = functools.partial(workers.ClusterOptions, **classes(kills))
    sys.argv = ["raymeld", *words]
    cli.main()


if __name__ == "__main__":
    _main(sys.argv[1], sys.argv[2:])

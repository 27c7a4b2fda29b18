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
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
    "before merge_core.commit:write_ledger",
    "after merge_core.commit:write_ledger",
    "before merge_core.commit:Assembly.publish",
    "before merge_core.commit:shutil.rmtree",
    "after merge_core.commit:shutil.rmtree",
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
PLACES = {"worker": WORKER, "raylet": WORKER, "collector": COLLECTOR, "driver": DRIVER}
"""Where each may die, in the order in which a merge comes past."""


@dataclass(frozen=True, kw_only=True)
class Kill:
    """One death; of a raylet it is the one above the worker that comes to the place."""

    victim: str
    place: str
    """``before`` or ``after``, a module, a function in it."""
    about: str = ""
    """Only when an argument of the call contains this."""
    call: int = 1
    """At which of these calls in one process."""
    mark: str = ""
    """A file that says that it has happened: whoever comes next lives."""

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
        with contextlib.suppress(FileExistsError):
            os.close(os.open(self.mark, os.O_CREAT | os.O_EXCL))
            if self.victim == "raylet":
                os.kill(os.getppid(), signal.SIGKILL)
                threading.Event().wait()  # a machine's processes vanish together
            os.kill(os.getpid(), signal.SIGKILL)


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
            _arm(kills, "worker", "raylet")
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

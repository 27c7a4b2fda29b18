"""Small merges on a cluster whose processes die at random places, and what must hold after each."""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import kills
import psutil
from aftermath import actors_of, assert_tidy
from clusters import NOTICED_AT_ONCE, alive, cluster, environment
from handmade import published, small_merge
from head import until
from kills import PLACES, Kill

from cluster.scratch import scratch_directory
from merge_core.merge import merge
from merge_core.plan import MergePlan

NODES = 3
"""For workers, with one CPU each; the head has none."""

DEATHS_MEAN = 2.0
CALLS_MEAN = 1.0
"""Of the calls that are let pass before the one that is fatal."""

WEIGHTS = {"worker": 4, "collector": 2, "driver": 3, "raylet": 1, "drain": 1, "memory": 1}

MOST = {"collector": 2, "memory": 2, "raylet": 1, "drain": 1}
"""In a round. A third one in a row is where a merge gives up on purpose; a node must be left."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """What happened in a round that ended well."""

    number: int
    workers: int
    planned: int
    happened: dict[str, int]
    """By victim."""
    runs: int
    """How often the command was given."""
    retried: int
    collectors: int
    """That were started because one died."""
    resumed: int
    """Shards that a later run found done, and proved."""
    seconds: float


class LostError(Exception):
    """A round that did not end well."""


def draw(generator: random.Random) -> list[Kill]:
    """What dies in a round, and where."""
    deaths: list[Kill] = []
    for _ in range(min(8, 1 + int(generator.expovariate(1 / DEATHS_MEAN)))):
        (victim,) = generator.choices([*WEIGHTS], [*WEIGHTS.values()])
        drawn = [kill for kill in deaths if kill.victim == victim]
        places = sorted(set(PLACES[victim]) - {kill.place for kill in drawn})
        call = 1 + int(generator.expovariate(1 / CALLS_MEAN))
        kill = Kill(victim=victim, place=generator.choice(places), call=call)
        if len(drawn) < MOST.get(victim, len(PLACES[victim])):
            deaths.append(kill)
    return deaths


class Soak:
    """A cluster, a merge, and what it must give.

    Args:
        where: a directory of its own, with a short name.
    """

    def __init__(self, where: Path, nodes: Any, seed: int) -> None:
        self._where, self._nodes, self._seed = where, nodes, seed
        self._plan: MergePlan = small_merge(where / "inputs")
        merge(self._plan, where / "reference")
        self._expected = published(where / "reference")
        for name in ("home", "t"):
            (where / name).mkdir()

    def round(self, number: int) -> Round:
        """Merge once, whatever dies.

        Raises:
            LostError: a run failed that was not killed, or something is lost, or left.
        """
        generator = random.Random(f"{self._seed} {number}")
        deaths = kills.marked(draw(generator), self._where / f"marks-{number}")
        workers, out = generator.randint(1, NODES), self._where / f"out-{number}"
        clock, said = time.perf_counter(), list[str]()
        with self._told(number, deaths, said):
            while True:
                ended = self._run(deaths, out, workers)
                said.append(ended.stderr)
                if ended.returncode != -signal.SIGKILL:
                    break
            seconds = time.perf_counter() - clock
            assert ended.returncode == 0, f"exit code {ended.returncode}"
            assert published(out) == self._expected, "other bytes"
            self._repair(deaths)
            self._look_around(out)
        text = "".join(said)
        return Round(
            number=number,
            workers=workers,
            planned=len(deaths),
            happened=dict(Counter(kill.victim for kill in deaths if kill.happened)),
            runs=len(said),
            retried=text.count("retrying "),
            collectors=text.count("starting another collector"),
            resumed=sum(map(int, re.findall(r"(\d+) of \d+ shards were there", text))),
            seconds=seconds,
        )

    def _run(
        self, deaths: Sequence[Kill], out: Path, workers: int
    ) -> subprocess.CompletedProcess[str]:
        words: list[object] = ["merge", self._plan.base, self._plan.adapters[0].path, "--out", out]
        words += ["--shard-size", "18kB", "--device", "cpu", "--workers", workers]
        return subprocess.run(
            kills.command(deaths, *words, "--address", self._nodes.address),
            env={**os.environ, "HOME": f"{self._where}/home", "TMPDIR": f"{self._where}/t"},
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )

    def _look_around(self, out: Path) -> None:
        """Nothing is left: no file beside the result, no token, no directory of sockets, no actor.

        Ray takes a moment to end those of a driver that was killed.
        """
        assert_tidy(out)
        self._sweep()
        left = [path for name in ("home/.ray", "t") for path in (self._where / name).glob("*")]
        with contextlib.suppress(AssertionError):
            until(lambda: not actors_of(str(self._where)))
        left += actors_of(str(self._where))
        assert not left, left

    def _sweep(self) -> None:
        """As the next merge does that needs Ray: the last one may have found everything done."""
        before, tempfile.tempdir = tempfile.tempdir, f"{self._where}/t"
        try:
            with scratch_directory():
                pass
        finally:
            tempfile.tempdir = before

    def _repair(self, deaths: Sequence[Kill]) -> None:
        """Put a new node in the place of each that was killed or drained."""
        for kill in deaths:
            if kill.happened and kill.victim in ("raylet", "drain"):
                raylet = int(Path(kill.mark).read_text())
                until(lambda raylet=raylet: not _runs(raylet), what="the end of a drained node")
        for node in list(self._nodes.worker_nodes):
            if any(kind == "raylet" for kind, _ in node.dead_processes()):
                self._nodes.remove_node(node, allow_graceful=False)
        while len(self._nodes.worker_nodes) < NODES:
            self._nodes.add_node(num_cpus=1)

    @contextlib.contextmanager
    def _told(self, number: int, deaths: Sequence[Kill], said: list[str]) -> Iterator[None]:
        """Say what led to what goes wrong inside."""
        try:
            yield
        except (AssertionError, subprocess.TimeoutExpired) as error:
            lines = [f"round {number} of seed {self._seed}: {error}", *map(str, deaths), *said]
            raise LostError("\n".join(lines)) from error


def _runs(process: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return alive(psutil.Process(process))
    return False


@contextlib.contextmanager
def soak(seed: int) -> Iterator[Soak]:
    """A cluster to be tormented."""
    with (
        tempfile.TemporaryDirectory(prefix="rm-", dir="/tmp") as where,  # it holds sockets
        environment(RAYMELD_TEST=where),
        cluster(cpus=0, system=NOTICED_AT_ONCE) as nodes,
    ):
        for _ in range(NODES):
            nodes.add_node(num_cpus=1)
        yield Soak(Path(where), nodes, seed)

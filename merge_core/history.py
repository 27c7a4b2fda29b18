"""The history of each run of a merge: phases, pace, failed attempts, decisions, verification.

One JSON file a run, ``OUT/.raymeld/runs/``, which stays after the commit: what the ledger says of
tensors it says of the way there. Not durable, like ``progress.json``; receipts are.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import platform
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from merge_core import __version__
from merge_core.errors import StorageError
from merge_core.holder import Holder
from merge_core.kept_json import KeptJson
from merge_core.output import RUNS
from merge_core.progress import INTERRUPTED, Progress, ProgressFile, Watch
from merge_core.stores.location import Location
from merge_core.stores.opening import open_store
from merge_core.verdict import describe_report
from merge_core.verify import VerifyReport

MOST_LINES = 1000
"""Decisions that a run remembers, the first ones: a merge that needs more of them repeats itself,
and ``progress.json`` has the last ones."""

MOST_SAMPLES = 600
"""Of the pace; when there are as many, every second one is forgotten. No chart shows more."""

SAMPLE_SECONDS = 0.2
"""Between two samples at first."""

WRITE_SECONDS = 15.0
"""How often the file is written on the way: what a crash may lose, beside what receipts tell."""

_LIBRARIES = ("torch", "ray", "peft", "transformers")


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """What a worker was at that left no receipt: a check, or a shard that it did not finish."""

    worker: str
    host: str
    phase: str
    """See ``Progress.phase``."""
    task: str
    began: float
    """Seconds since the epoch, like the next."""
    ended: float
    outcome: str
    """``done``, ``failed``, ``lost`` (the worker died) or ``released`` (it was let go)."""
    why: str = ""

    @classmethod
    def failed(cls, worker: str, shard: str, began: float, error: Exception) -> Self:
        """A shard that a worker of this process could not merge."""
        return cls(
            worker=worker,
            host=socket.gethostname(),
            phase="merging",
            task=shard,
            began=began,
            ended=time.time(),
            outcome="failed",
            why=str(error),
        )


class History:
    """Keeps the history of one run, and passes everything on.

    As a context it also keeps what the run ended with.

    Args:
        holder: of the lease under which it writes; once another merge has it, nothing is kept.
        options: of the run, which change no byte of the result.
        watch: told what ``watch`` is told, as is ``say``.
    """

    def __init__(
        self,
        out: Location,
        holder: Holder,
        options: Mapping[str, Any],
        watch: Watch,
        say: Callable[[str], None],
    ) -> None:
        self._store, self._watch, self._say = open_store(out), watch, say
        now = time.time()
        self._record: dict[str, Any] = {
            "run": holder.run,
            "host": holder.host,
            "pid": holder.pid,
            "versions": _versions(),
            "options": dict(options),
            "began": now,
            "ended": None,
            "outcome": "running",
            "error": "",
            "phases": [],
            "samples": [],
            "attempts": [],
            "lines": [],
            "verification": None,
        }
        stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(now))
        self._file = KeptJson(out, f"{RUNS}/{stamp}-{holder.run[:8]}.json", holder.run)
        self._noted: set[str] = set()
        self._every, self._sampled, self._written = SAMPLE_SECONDS, 0.0, 0.0

    def __enter__(self) -> Self:
        with contextlib.suppress(StorageError):
            for listed in self._store.list(RUNS):
                if listed.name.endswith(".tmp"):  # of a run that was killed
                    self._store.delete(listed.name)
        self._file.keep(self._content())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._record["outcome"] = "done" if error is None else "stopped"
        if error is not None:
            interrupted = isinstance(error, KeyboardInterrupt)
            self._record["error"] = INTERRUPTED if interrupted else str(error) or repr(error)
        self._record["ended"] = time.time()
        self._file.close(self._content())

    def say(self, line: str) -> None:
        """Keep a decision, and pass it on."""
        if len(self._record["lines"]) < MOST_LINES:
            self._record["lines"].append((time.time(), line))
        self._say(line)

    def note(self, line: str) -> None:
        """Say what a receipt notes, once; an empty one notes nothing."""
        if line and line not in self._noted:
            self._noted.add(line)
            self.say(line)

    def watch(self, progress: Progress) -> None:
        """Keep when a phase began and how fast it goes, and pass the progress on."""
        now, phases = time.time(), self._record["phases"]
        if not phases or phases[-1]["phase"] != progress.phase:
            if phases:  # the next one begins when all of it is done
                phases[-1] |= {"ended": now, "done": phases[-1]["total"]}
            phases.append({"phase": progress.phase, "began": now, "before": progress.done})
            self._sampled = 0.0
        phases[-1] |= {"ended": now, "done": progress.done, "total": progress.total}
        if now - self._sampled >= self._every:
            self._sample(now, len(phases) - 1, progress.done)
        if now - self._written >= WRITE_SECONDS:
            self._file.keep(self._content())
        self._watch(progress)

    def attempt(self, attempt: Attempt) -> None:
        """Keep what left no receipt."""
        self._record["attempts"].append(dataclasses.asdict(attempt))

    def verified(self, report: VerifyReport) -> None:
        """Keep what a verification found, above all if the result is not published for it."""
        self._record["verification"] = describe_report(report)

    def _sample(self, now: float, phase: int, done: int) -> None:
        self._sampled, samples = now, self._record["samples"]
        samples.append((now, phase, done))
        if len(samples) >= MOST_SAMPLES:
            del samples[1::2]
            self._every *= 2

    def _content(self) -> dict[str, Any]:
        self._written = time.time()
        return {**self._record, "written": self._written}


@contextlib.contextmanager
def recorded(
    out: Location,
    holder: Holder,
    options: Mapping[str, Any],
    watch: Watch,
    say: Callable[[str], None],
) -> Iterator[History]:
    """Keep, while inside, the history of a run and how far it is; see ``History``."""
    with (
        ProgressFile(out, holder.run, watch, say) as progress,
        History(out, holder, options, progress.watch, progress.say) as history,
    ):
        yield history


def read_runs(out: Location) -> list[dict[str, Any]]:
    """The runs of the merge in ``out``, the oldest first; what cannot be read is left out.

    Keys: those of ``History``, and ``written``: seconds since the epoch.
    """
    store, runs = open_store(out), []
    for name in [listed.name for listed in store.list(RUNS) if listed.name.endswith(".json")]:
        with contextlib.suppress(StorageError, ValueError):
            content = json.loads(store.get(name))
            if isinstance(content, dict) and isinstance(content.get("began"), float):
                runs.append(content)
    return sorted(runs, key=lambda run: float(run["began"]))


def _versions() -> dict[str, str]:
    versions = {"raymeld": __version__, "python": platform.python_version()}
    for name in _LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions

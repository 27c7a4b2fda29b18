"""How far a merge is: what inline merges and Ray drivers report, consoles draw, and OUT keeps."""

from __future__ import annotations

import dataclasses
import json
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, TypeVar

from merge_core.errors import StorageError
from merge_core.kept_json import KeptJson
from merge_core.output import PROGRESS
from merge_core.stores.location import Location
from merge_core.stores.opening import read_file

KEPT_LINES = 50
"""Decisions that the file remembers: the last ones explain why a merge is slow or stopped."""

WRITE_SECONDS = 1.0
"""How often the file is written; who looks at it looks no closer."""

INTERRUPTED = "interrupted"
"""Why a run stopped that somebody, or its machine, asked to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerProgress:
    """What one worker is doing."""

    worker: str
    device: str
    doing: str
    """The shard's file name, or what it waits for."""
    done: int
    """Bytes of that shard."""
    size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """The state of the whole merge."""

    phase: str
    """``proving`` (what an earlier run did), ``merging`` or ``verifying``."""
    done: int
    """Bytes written (or read back) so far, of all shards."""
    total: int
    workers: tuple[WorkerProgress, ...]


Watch = Callable[[Progress], None]

_Check = TypeVar("_Check")
_Result = TypeVar("_Result")


def in_turn(
    phase: str, watch: Watch, size_of: Callable[[_Check], int]
) -> Callable[[Callable[[_Check], _Result], Sequence[_Check]], Iterator[_Result]]:
    """How checks are run one after another, and told in between how far that is.

    Args:
        size_of: bytes of the file that a check is about. What it reads may be more: the numeric
            one reads the base as well.
    """

    def run(check: Callable[[_Check], _Result], checks: Sequence[_Check]) -> Iterator[_Result]:
        sizes = [size_of(one) for one in checks]
        for number, one in enumerate(checks):
            done = sum(sizes[:number])
            watch(Progress(phase=phase, done=done, total=sum(sizes), workers=()))
            yield check(one)

    return run


class ProgressFile:
    """Keeps ``OUT/.raymeld/progress.json`` for ``raymeld status``, and passes everything on.

    As a context it also keeps what the merge ended with. Not durable: after a crash of the machine
    the receipts tell what is done.

    Args:
        run: of the lease under which it writes; once another merge has it, nothing is kept.
    """

    def __init__(self, out: Location, run: str, watch: Watch, say: Callable[[str], None]) -> None:
        self._file = KeptJson(out, PROGRESS, run)
        self._watch, self._say = watch, say
        self._lines: deque[tuple[float, str]] = deque(maxlen=KEPT_LINES)
        self._last = Progress(phase="starting", done=0, total=0, workers=())
        self._began, self._before, self._written = time.time(), 0, 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            interrupted = isinstance(error, KeyboardInterrupt)
            why = INTERRUPTED if interrupted else str(error) or type(error).__name__
            self._lines.append((time.time(), f"stopped: {why}"))
        self._file.close(self._content(dataclasses.replace(self._last, workers=())))

    def say(self, line: str) -> None:
        """Keep a decision, and say it."""
        self._lines.append((time.time(), line))
        self._say(line)

    def watch(self, progress: Progress) -> None:
        """Keep the progress, and show it."""
        now = time.time()
        if progress.phase != self._last.phase:
            self._began, self._before = now, progress.done
        self._last = progress
        if now - self._written >= WRITE_SECONDS:
            self._written = now
            self._file.keep(self._content(progress))
        self._watch(progress)

    def _content(self, progress: Progress) -> dict[str, Any]:
        return {
            **dataclasses.asdict(progress),
            "began": self._began,
            "before": self._before,
            "written": time.time(),
            "lines": list(self._lines),
        }


def read_progress(out: Location) -> dict[str, Any] | None:
    """What the last merge in ``out`` kept, or None.

    Keys: those of ``Progress``; ``began`` and ``written``, seconds since the epoch; ``before``, the
    bytes that were done when the phase began; ``lines``, pairs of time and decision.
    """
    try:
        content = json.loads(read_file(out / PROGRESS))
    except (StorageError, ValueError):
        return None
    return content if isinstance(content, dict) else None

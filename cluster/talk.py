"""Talk on stderr while a merge runs: bars on a terminal, a line now and then elsewhere.

In a Ray Job the lines are JSON; see ``log_lines``.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.progress import Progress as Bars
from rich.table import Column
from rich.text import Text

from cluster.folding import fold
from cluster.log_lines import log, logs_json
from cluster.stderr import Stderr
from merge_core.errors import counted
from merge_core.progress import Progress

LINE_SECONDS = 10.0
"""How often a line is printed where there is no terminal: a log of an hour stays readable."""


NARROW = 80
"""Columns below which rate and bar give way to the names."""


class Talk:
    """Talk on stderr: bars on a terminal, a line now and then elsewhere, nothing if quiet.

    Args:
        out: what all of it is about, for who looks for that in a log.
    """

    def __init__(self, *, quiet: bool, out: object | None = None) -> None:
        self._quiet, self._out = quiet, out
        self._json = logs_json()
        self._console: Console = Stderr()
        self._bars: Bars | None = None
        self._tasks: dict[str, TaskID] = {}
        self._phase, self._since, self._before, self._printed = "", 0.0, 0, 0.0

    def say(self, line: str) -> None:
        """Print a line of talk."""
        self._tell(line)

    def _tell(self, line: str, **fields: Any) -> None:
        if self._quiet:
            return
        if self._json:
            log(line, out=self._out, **fields)
        else:
            shown = fold(line, self._console.width) if self._console.is_terminal else line
            self._console.print(shown, markup=False, soft_wrap=True)

    @contextlib.contextmanager
    def progress(self) -> Iterator[None]:
        """Show progress while inside."""
        if self._quiet or self._json or not self._console.is_terminal:
            yield
            return
        columns = _columns(self._console.width)
        with Bars(*columns, console=self._console, transient=True) as self._bars:
            yield
        self._bars = None

    def watch(self, progress: Progress) -> None:
        """Show how far the merge is."""
        if self._quiet:
            return
        if self._bars is not None:
            self._draw(self._bars, progress)
        else:
            self._print_line(progress)

    def _draw(self, bars: Bars, progress: Progress) -> None:
        if progress.phase != self._phase:
            self._phase = progress.phase
            for task in self._tasks.values():
                bars.remove_task(task)
            self._tasks = {}
        self._update(bars, progress.phase, progress.phase, progress.done, progress.total)
        for worker in progress.workers:
            doing = f"  {worker.worker} {worker.doing.removesuffix('.safetensors')}"
            self._update(bars, worker.worker, doing, worker.done, worker.size)
        gone = self._tasks.keys() - {progress.phase, *(w.worker for w in progress.workers)}
        for name in gone:
            bars.remove_task(self._tasks.pop(name))

    def _update(self, bars: Bars, name: str, text: str, done: int, total: int) -> None:
        if name not in self._tasks:
            self._tasks[name] = bars.add_task(text, total=total or None)
        bars.update(self._tasks[name], description=text, completed=done, total=total or None)

    def _print_line(self, progress: Progress) -> None:
        now = time.monotonic()
        if progress.phase != self._phase:
            self._phase, self._since, self._printed = progress.phase, now, now
            self._before = progress.done  # checks are done while shards are merged
        if now - self._printed < LINE_SECONDS:
            return
        self._printed = now
        rate = max(0, progress.done - self._before) / (now - self._since)
        workers = f", {counted(len(progress.workers), 'worker')}" * bool(progress.workers)
        left = f", {(progress.total - progress.done) / rate:.0f} s left" if rate else ""
        self._tell(
            f"{progress.phase}: {progress.done / 1e9:.2f} of {progress.total / 1e9:.2f} GB,"
            f" {rate / 1e9:.2f} GB/s{left}{workers}",
            phase=progress.phase,
            done=progress.done,
            total=progress.total,
            bytes_per_second=round(rate),
            workers=len(progress.workers),
        )


class _Amount(DownloadColumn):
    """Bytes done of all bytes; nothing where they are not counted."""

    def render(self, task: Task) -> Text:
        """See ``ProgressColumn.render``."""
        return super().render(task) if task.total else Text()


def _columns(width: int) -> list[ProgressColumn]:
    fixed = Column(no_wrap=True)
    name = TextColumn("{task.description}", table_column=Column(no_wrap=True, overflow="ellipsis"))
    amount, left = _Amount(table_column=fixed), TimeRemainingColumn(table_column=fixed)
    if width < NARROW:
        return [name, amount, left]
    return [name, BarColumn(bar_width=20), amount, TransferSpeedColumn(table_column=fixed), left]

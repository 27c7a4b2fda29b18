"""One command, from start to exit and ``sync``: its seconds, its memory, its bytes. Linux only."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

INTERVAL = 0.05
"""Seconds between looks at the resident memory of the process tree; a look costs some 2 ms."""

GROWTH, LATEST = 1.01, 1.0
"""PSS is read when the resident total grew by a hundredth, and once a second anyway. The kernel
walks every page for it, 10 ms for a process with torch in it: at each look that would take a
fifth of a core away from what is measured."""

DROP_CACHES = Path("/proc/sys/vm/drop_caches")


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One run of one row."""

    seconds: float
    """From start to exit, plus ``sync``."""
    sync_seconds: float
    """The part of it that ``sync`` took."""
    tree_pss: int
    """Largest sum of PSS over the process and all below it, sampled."""
    largest_rss: int
    """Largest RSS of a single process, sampled."""
    output_bytes: int
    cold: bool
    """The page cache was dropped before."""


class CommandError(Exception):
    """A measured command failed; carries the end of what it said."""


def measure(command: Sequence[str], out: Path, log: Path) -> Measured:
    """Run ``command``, which makes directory ``out``, in the same state as every other row.

    Raises:
        CommandError: it ended with another exit code than 0.
    """
    shutil.rmtree(out, ignore_errors=True)
    os.sync()  # nobody pays for the writes, or the removal, of the row before
    cold = drop_page_cache()
    with log.open("wb") as file:
        clock = time.perf_counter()
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT
        )
        watch = MemoryWatch(process.pid)
        try:
            code = process.wait()
        except BaseException:
            process.terminate()
            process.wait()
            raise
        finally:
            watch.finished.set()
        ended = time.perf_counter()
        os.sync()
        done = time.perf_counter()
    watch.join()
    if code != 0:
        said = log.read_text(errors="replace").strip()[-2000:]
        raise CommandError(f"{' '.join(command)}\nended with exit code {code}:\n{said}")
    return Measured(
        seconds=done - clock,
        sync_seconds=done - ended,
        tree_pss=watch.tree_pss,
        largest_rss=watch.largest_rss,
        output_bytes=sum(f.stat().st_size for f in out.rglob("*") if f.is_file()),
        cold=cold,
    )


def drop_page_cache() -> bool:
    """Drop it, with cached directory entries, where this process may; say whether it was."""
    try:
        DROP_CACHES.write_text("3\n")
    except OSError:
        return False
    return True


class MemoryWatch(threading.Thread):
    """Samples the memory of a process and of everything that it started."""

    def __init__(self, pid: int, interval: float = INTERVAL) -> None:
        super().__init__(daemon=True)
        self._interval = interval
        self.finished = threading.Event()
        self.tree_pss = self.largest_rss = 0
        self._root = psutil.Process(pid)
        self._known, self._due = 0.0, 0.0
        self.start()

    def run(self) -> None:
        """Look until told that the process finished, or until it has gone."""
        with contextlib.suppress(psutil.Error):
            while True:
                self._look([self._root, *self._root.children(recursive=True)])
                if self.finished.wait(self._interval):
                    return

    def _look(self, tree: Sequence[psutil.Process]) -> None:
        resident = [_rss(process) for process in tree]
        self.largest_rss = max(self.largest_rss, *resident)
        total, now = sum(resident), time.monotonic()
        if total > self._known * GROWTH or now > self._due:
            self._known, self._due = max(self._known, total), now + LATEST
            self.tree_pss = max(self.tree_pss, sum(_pss(process) for process in tree))


def _rss(process: psutil.Process) -> int:
    with contextlib.suppress(psutil.Error):  # gone since it was listed
        return int(process.memory_info().rss)
    return 0


def _pss(process: psutil.Process) -> int:
    with contextlib.suppress(psutil.Error):
        return int(process.memory_full_info().pss)
    return 0

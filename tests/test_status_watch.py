"""``raymeld status --watch``: what fits on the screen, lines elsewhere, how it ends."""

from __future__ import annotations

import io
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import pytest
from handmade import TWO_LANES
from leases import take, unheard
from rich.console import Console

from cluster import status_watch
from cluster.status import Status, read_status
from cluster.status_watch import view, watch_status
from merge_core.merge import merge
from merge_core.plan import MergePlan
from merge_core.progress import Progress, ProgressFile, WorkerProgress
from merge_core.stores.location import locate


class Elsewhere(ExitStack):
    """A merge that another process does, step by step."""

    def __init__(self, plan: MergePlan, out: Path) -> None:
        super().__init__()
        merge(plan, out, choice=TWO_LANES)
        (out / "config.json").unlink()  # it was not finished yet
        lease = self.enter_context(take(out))
        self.file = ProgressFile(locate(out), lease.holder.run, lambda _: None, unheard)

    def reach(self, done: int, workers: int = 2) -> None:
        """Be so far; a worker is at a shard, or idle."""
        each = tuple(
            WorkerProgress(
                worker=f"worker-{n}",
                device=f"NVIDIA H200 on gpu-node-{n:02}.some.where.far.away.example",
                doing="idle" if n == 1 else f"model-{n:05}-of-00082.safetensors",
                done=0 if n == 1 else 25,
                size=0 if n == 1 else 100,
            )
            for n in range(workers)
        )
        self.file._written = 0.0
        self.file.watch(Progress(phase="merging", done=done, total=4 * 10**9, workers=each))


@pytest.fixture
def elsewhere(small: MergePlan, out: Path) -> Iterator[Elsewhere]:
    with Elsewhere(small, out) as one:
        yield one


def drawn(status: Status, width: int, height: int) -> list[str]:
    console = Console(file=io.StringIO(), width=width, height=height)
    console.print(view(status, width, height))
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize("workers", [2, 64])
def test_the_view_fits_the_screen_whatever_it_shows(
    elsewhere: Elsewhere, out: Path, width: int, workers: int
) -> None:
    for number in range(9):
        elsewhere.file.say(f"decision {number} is told in a sentence " + "as long as it takes " * 9)
    elsewhere.reach(10**9, workers)
    lines = drawn(read_status(locate(out)), width, 24)

    assert len(lines) <= 24
    assert all(len(line) <= width for line in lines)
    text = "\n".join(lines)
    assert "1.00 of 4.00 GB" in text
    assert "decision 8" in text
    assert "decision 3" not in text
    assert "model-00000-of-00082" in text
    assert " 25%" in text
    assert ("NVIDIA" in text) == (width == 120)
    assert ("and " in text and " more" in text) == (workers == 64)


def test_markup_in_what_is_told_is_shown_as_it_is(elsewhere: Elsewhere, out: Path) -> None:
    elsewhere.file.say("[bold]retrying[/] shard")
    elsewhere.reach(1)
    assert "[bold]retrying[/] shard" in "\n".join(drawn(read_status(locate(out)), 80, 24))


def test_a_merge_that_has_said_nothing_yet_is_starting(small: MergePlan, out: Path) -> None:
    with Elsewhere(small, out):
        (out / ".raymeld" / "progress.json").unlink()
        assert "starting" in drawn(read_status(locate(out)), 80, 24)[1]


def test_without_a_terminal_there_is_a_line_now_and_then(
    elsewhere: Elsewhere, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = SimpleNamespace(now=0.0, monotonic=lambda: clock.now)

    def sleep(seconds: float) -> None:
        clock.now += seconds
        if clock.now >= 24:
            elsewhere.close()
        else:
            if clock.now == 8:
                elsewhere.file.say("retrying shard 3")
            elsewhere.reach(int(clock.now * 1e8))

    clock.sleep = sleep
    monkeypatch.setattr(status_watch, "time", clock)
    elsewhere.reach(0)
    heard = io.StringIO()
    status = watch_status(locate(out), Console(file=heard, width=80))

    assert status.state == "stopped"
    lines = [line.split(", about")[0] for line in heard.getvalue().splitlines()]
    assert lines == [
        "merging: 0.00 of 4.00 GB, 0 of 4 shards, 2 workers",
        "retrying shard 3",
        "merging: 1.00 of 4.00 GB, 0 of 4 shards, 2 workers",
        "merging: 2.00 of 4.00 GB, 0 of 4 shards, 2 workers",
    ]


class Terminal:
    """The command in a terminal of its own."""

    def __init__(self, out: Path) -> None:
        self._ours, theirs = pty.openpty()
        self._read = b""
        self.process = subprocess.Popen(
            [Path(sys.executable).with_name("raymeld"), "status", out, "--watch"],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env={**os.environ, "COLUMNS": "100", "LINES": "24", "TERM": "xterm"},
        )
        os.close(theirs)

    def until(self, text: str) -> None:
        while text.encode() not in self._read:
            self._read += os.read(self._ours, 65536)  # an OSError once it has ended

    def end(self) -> tuple[int, str]:
        while True:
            try:
                self._read += os.read(self._ours, 65536)
            except OSError:
                os.close(self._ours)
                return self.process.wait(timeout=30), self._read.decode()


def test_the_view_ends_with_the_merge_and_leaves_its_last_state(
    elsewhere: Elsewhere, small: MergePlan, out: Path
) -> None:
    elsewhere.reach(10**9)
    terminal = Terminal(out)
    terminal.until("1.00 of 4.00 GB")
    elsewhere.close()
    code, text = terminal.end()

    assert code == 0
    assert "the same merge command again goes on from here" in text.rpartition("stopped  ")[2]


def test_ctrl_c_leaves_at_once_and_leaves_the_merge_alone(elsewhere: Elsewhere, out: Path) -> None:
    elsewhere.reach(10**9)
    terminal = Terminal(out)
    terminal.until("1.00 of 4.00 GB")
    terminal.process.send_signal(signal.SIGINT)
    code, text = terminal.end()

    assert code == 130
    assert text.rstrip().endswith("left; the merge goes on")
    assert "\x1b[?25h" in text  # the cursor is back
    assert read_status(locate(out)).state == "running"


def test_a_finished_merge_is_told_once(small: MergePlan, out: Path) -> None:
    merge(small, out, choice=TWO_LANES)
    command = [Path(sys.executable).with_name("raymeld"), "status", out]
    watched = subprocess.run([*command, "--watch"], capture_output=True, text=True, check=True)
    once = subprocess.run(command, capture_output=True, text=True, check=True)

    assert (watched.stdout, watched.stderr) == (once.stdout, "")


def test_an_answer_in_json_is_not_watched(small: MergePlan, out: Path) -> None:
    merge(small, out, choice=TWO_LANES)
    command = [Path(sys.executable).with_name("raymeld"), "status", out, "--watch", "--json"]
    done = subprocess.run(command, capture_output=True, text=True)

    assert done.returncode == 2
    assert "an answer in JSON is given once" in done.stderr

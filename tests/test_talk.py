"""Talk on stderr while a merge runs."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console
from typer.testing import CliRunner

from cluster import talk
from cluster.cli import app
from cluster.folding import fold
from cluster.talk import Talk
from merge_core.plan import MergePlan
from merge_core.progress import Progress, WorkerProgress


def progress(done: int, phase: str = "merging", workers: int = 2) -> Progress:
    each = WorkerProgress(worker="worker-0", device="cpu", doing="model", done=1, size=2)
    return Progress(phase=phase, done=done, total=4_000_000_000, workers=(each,) * workers)


def watched(
    monkeypatch: pytest.MonkeyPatch, events: list[tuple[float, Progress]], *, quiet: bool = False
) -> None:
    """Show each progress at its second."""
    seconds = [0.0]
    monkeypatch.setattr(talk, "time", SimpleNamespace(monotonic=lambda: seconds[0]))
    teller = talk.Talk(quiet=quiet)
    with teller.progress():
        for now, state in events:
            seconds[0] = 1000 + now
            teller.watch(state)
    teller.say("[done]")


def test_without_a_terminal_a_line_is_printed_only_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    events = [(n / 4, progress(int(n / 4 * 1e8))) for n in range(int(4 * 2.5 * talk.LINE_SECONDS))]
    watched(monkeypatch, events)
    out, err = capsys.readouterr()

    assert out == ""
    assert err.splitlines() == [
        "merging: 1.00 of 4.00 GB, 0.10 GB/s, 30 s left, 2 workers",
        "merging: 2.00 of 4.00 GB, 0.10 GB/s, 20 s left, 2 workers",
        "[done]",
    ]


def test_each_phase_counts_its_own_time(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = [(0.0, progress(0)), (9.0, progress(4_000_000_000))]
    after = [(9.5, progress(0, "verifying")), (11.0, progress(10**9, "verifying"))]
    watched(monkeypatch, [*before, *after, (19.5, progress(2 * 10**9, "verifying"))])

    assert capsys.readouterr().err.splitlines() == [
        "verifying: 2.00 of 4.00 GB, 0.20 GB/s, 10 s left, 2 workers",
        "[done]",
    ]


def test_a_phase_counts_from_what_was_done_when_it_began(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the checks most are done while shards are still merged."""
    events = [(0.0, progress(0)), (1.0, progress(3 * 10**9, "verifying"))]
    watched(monkeypatch, [*events, (11.0, progress(35 * 10**8, "verifying"))])

    assert capsys.readouterr().err.splitlines() == [
        "verifying: 3.50 of 4.00 GB, 0.05 GB/s, 10 s left, 2 workers",
        "[done]",
    ]


def test_nothing_done_yet_promises_no_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    watched(monkeypatch, [(0.0, progress(0)), (10.0, progress(0))])

    assert capsys.readouterr().err.startswith("merging: 0.00 of 4.00 GB, 0.00 GB/s, 2 workers\n")


def test_a_single_worker_is_no_workers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    watched(monkeypatch, [(0.0, progress(0)), (10.0, progress(0, workers=1))])

    assert capsys.readouterr().err.splitlines()[0].endswith(", 1 worker")


def test_quiet_says_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    watched(monkeypatch, [(0.0, progress(0)), (99.0, progress(10**9))], quiet=True)

    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("width", [50, 80, 120])
def test_the_bars_fit_into_one_line_each(width: int) -> None:
    teller, seen = talk.Talk(quiet=False), io.StringIO()
    teller._console = Console(file=seen, force_terminal=True, width=width, color_system=None)
    file = "model-00005-of-00082.safetensors"
    merging = WorkerProgress(worker="worker-0", device="cpu", doing=file, done=1, size=2 * 10**9)
    checking = WorkerProgress(worker="worker-1", device="cpu", doing=file, done=0, size=0)
    with teller.progress():
        workers = (merging, checking)
        teller.watch(Progress(phase="merging", done=10**9, total=4 * 10**9, workers=workers))
        assert teller._bars is not None
        teller._bars.refresh()
        shown = io.StringIO()
        Console(file=shown, width=width).print(teller._bars.get_renderable())

    lines = [line.rstrip() for line in shown.getvalue().splitlines()]
    assert [line.split()[0] for line in lines] == ["merging", "worker-0", "worker-1"]
    assert "1.0/4.0 GB" in lines[0]
    assert "0/0" not in lines[2]


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("short", "short"),
        ("adapter  one two three four", "adapter  one two\n         three four"),
        ("         one two three four", "         one two\n         three four"),
        (
            "adapter  /a/path/that/is/long of it",
            "adapter\n         /a/path/that/is/long\n         of it",
        ),
        ("interrupted by somebody else", "interrupted by\nsomebody else"),
        ("config.json has one field less", "config.json has one\nfield less"),
    ],
)
def test_lines_are_broken_between_words_below_what_they_are_about(line: str, shown: str) -> None:
    assert fold(line, 20) == shown


@pytest.mark.parametrize("again", ["verify", "merge"])
def test_who_reads_a_finished_merge_back_is_told_how_far_that_is(
    small: MergePlan, out: Path, monkeypatch: pytest.MonkeyPatch, again: str
) -> None:
    """Of a 72B the numeric check takes an hour on one machine."""
    words = [str(small.base), *(str(adapter.path) for adapter in small.adapters), "--out", str(out)]
    words += ["--shard-size", "20kB", "--address", "inline", "--quiet"]
    assert CliRunner().invoke(app, ["merge", *words]).exit_code == 0
    seen: list[Progress] = []
    monkeypatch.setattr(Talk, "watch", lambda _, progress: seen.append(progress))
    command = (
        ["verify", str(out), "--level"] if again == "verify" else ["merge", *words, "--verify"]
    )
    assert CliRunner().invoke(app, [*command, "numeric"]).exit_code == 0

    sizes = [path.stat().st_size for path in sorted(out.glob("*.safetensors"))]
    assert len(sizes) > 2
    assert [(now.phase, now.done, now.total) for now in seen] == [
        ("verifying", sum(sizes[:n]), sum(sizes)) for n in range(len(sizes))
    ]

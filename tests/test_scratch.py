"""Scratch directories: none outlives its process for longer than until the next one starts."""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.scratch import scratch_directory

HOLDS = """
import sys, tempfile
from cluster.scratch import scratch_directory

tempfile.tempdir = sys.argv[1]
with scratch_directory() as path:
    (path / "session").mkdir()
    (path / "session" / "socket").touch()
    print(path, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def temporary(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="rm-", dir="/tmp") as short:
        monkeypatch.setattr(tempfile, "tempdir", short)
        yield Path(short)


@pytest.fixture
def other(temporary: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process in a scratch directory of its own."""
    command = [sys.executable, "-c", HOLDS, str(temporary)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert Path(process.stdout.readline().strip()).parent == temporary
        yield process
        process.kill()


def test_what_a_killed_process_has_left_is_removed_by_the_next(
    temporary: Path, other: subprocess.Popen[str]
) -> None:
    other.send_signal(signal.SIGKILL)
    other.wait()
    assert len(list(temporary.iterdir())) == 1

    with scratch_directory() as mine:
        assert list(temporary.iterdir()) == [mine]

    assert list(temporary.iterdir()) == []


def test_what_a_live_process_uses_is_left_alone(
    temporary: Path, other: subprocess.Popen[str]
) -> None:
    with scratch_directory() as mine:
        (theirs,) = set(temporary.iterdir()) - {mine}

    assert (theirs / "session" / "socket").exists()


def test_what_is_not_a_scratch_directory_of_ours_is_left_alone(temporary: Path) -> None:
    target = temporary / "target"
    target.mkdir()
    (target / "alive").touch()
    (temporary / "raymeld-link").symlink_to(target)
    (temporary / "raymeld-notes").mkdir()
    (temporary / "raymeld-file").touch()

    with scratch_directory():
        pass

    kept = {path.name for path in temporary.iterdir()}
    assert kept == {"target", "raymeld-link", "raymeld-notes", "raymeld-file"}
    assert (target / "alive").exists()

"""Paths as they are seen from one machine, compared with how another sees them."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from handmade import files_below

from merge_core.errors import StorageError
from merge_core.reachable import (
    SAMPLE_BYTES,
    STALE_SECONDS,
    leave_token,
    look_at_input,
    nearest_directory,
    token_arrived,
    trial_directory,
)
from merge_core.stores.location import Location, locate


@pytest.fixture
def ours(tmp_path: Path) -> Path:
    """An input as the driver sees it."""
    path = tmp_path / "ours"
    path.mkdir()
    (path / "config.json").write_text('{"a": 1}')
    (path / "model.safetensors").write_bytes(bytes(3 * SAMPLE_BYTES))
    (path / ".cache").write_text("of no interest")
    return path


@pytest.fixture
def theirs(ours: Path, tmp_path: Path) -> Path:
    """An exact copy, as a node sees it."""
    return shutil.copytree(ours, tmp_path / "theirs")


def difference(theirs: Path, ours: Path) -> str | None:
    return look_at_input(locate(theirs)).difference(look_at_input(locate(ours)))


def test_an_exact_copy_is_the_same_whatever_is_hidden_in_it(ours: Path, theirs: Path) -> None:
    (theirs / ".cache").write_text("else")

    assert difference(theirs, ours) is None


def test_a_file_that_is_missing_or_more_or_other_is_named(ours: Path, theirs: Path) -> None:
    (theirs / "config.json").write_text('{"a": 2}')
    said = "holds other files than the driver sees there: "
    assert difference(theirs, ours) == said + "config.json differs"

    (theirs / "adapter_config.json").touch()
    assert difference(theirs, ours) == said + "adapter_config.json is there alone"

    (theirs / "config.json").unlink()
    (theirs / "model.safetensors").unlink()
    assert difference(theirs, ours) == said + "config.json is missing (2 such files)"


def test_files_that_no_worker_reads_are_told_apart_and_their_times_never(
    ours: Path, theirs: Path
) -> None:
    for name, change in (
        ("tokenizer.json", lambda path: os.utime(path, (1, 1))),
        ("README.md", lambda path: path.write_text("other")),
        ("download.lock", Path.unlink),
    ):
        for directory in (ours, theirs):
            (directory / name).write_text("same")
        change(theirs / name)

    assert difference(theirs, ours) is None
    assert look_at_input(locate(theirs)).side_difference(look_at_input(locate(ours))) == (
        "holds other files than the driver sees there: download.lock is missing"
    )
    shutil.copy2(ours / "download.lock", theirs)
    shutil.copy2(ours / "README.md", theirs)
    assert look_at_input(locate(theirs)).side_difference(look_at_input(locate(ours))) is None


@pytest.mark.parametrize("place", [0, SAMPLE_BYTES - 1, 2 * SAMPLE_BYTES, 3 * SAMPLE_BYTES - 1])
def test_weights_that_differ_at_an_end_are_other_weights(
    ours: Path, theirs: Path, place: int
) -> None:
    data = bytearray(3 * SAMPLE_BYTES)
    data[place] = 1
    (theirs / "model.safetensors").write_bytes(data)

    assert difference(theirs, ours) == (
        "holds other files than the driver sees there: model.safetensors differs"
    )


def test_a_copy_with_other_times_is_told_because_a_merge_refuses_it(
    ours: Path, theirs: Path
) -> None:
    os.utime(theirs / "config.json", (1, 1))

    assert difference(theirs, ours) == (
        "is a copy with other times, which a merge takes for files that changed"
    )


def test_what_cannot_be_read_says_why(ours: Path, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")

    assert look_at_input(locate(tmp_path / "gone")).error == "No such file or directory"
    assert look_at_input(locate(ours / "config.json")).error == "Not a directory"
    assert look_at_input(locate(tmp_path / "loop")).error == "Too many levels of symbolic links"
    assert look_at_input(locate(ours)).error is None


def test_a_file_that_cannot_be_read_is_named(ours: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", broken)

    assert look_at_input(locate(ours)).error == "config.json: Input/output error"


def test_tokens_arrive_where_the_trial_is_and_nothing_of_it_stays(tmp_path: Path) -> None:
    with trial_directory(locate(tmp_path)) as trial:
        assert leave_token(trial, "a") is None
        (trial / "half").local.write_text("ha")
        arrived = {name: token_arrived(trial, name) for name in ("a", "b", "half")}

    assert arrived == {"a": True, "b": False, "half": False}
    assert leave_token(trial, "late") == "what the driver makes there is not seen"
    assert list(tmp_path.iterdir()) == []


def test_a_trial_is_removed_when_what_happens_inside_fails(tmp_path: Path) -> None:
    def interrupt(trial: Location) -> None:
        leave_token(trial, "a")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), trial_directory(locate(tmp_path)) as trial:
        interrupt(trial)

    assert list(tmp_path.iterdir()) == []


def test_a_trial_that_is_written_into_while_it_is_removed_is_removed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remove = shutil.rmtree

    def late(trial: Path, **options: Any) -> None:
        """A token arrives after the directory was listed."""
        monkeypatch.setattr(shutil, "rmtree", remove)
        assert (trial, options) == (made.local, {"ignore_errors": True})

    monkeypatch.setattr(shutil, "rmtree", late)
    with trial_directory(locate(tmp_path)) as made:
        leave_token(made, "a")

    assert list(tmp_path.iterdir()) == []


def test_a_trial_that_cannot_be_removed_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as broken, trial_directory(locate(tmp_path)) as trial:
        broken.setattr(os, "rmdir", refused)

    assert trial.local.exists()


def refused(*_: object, **__: object) -> None:
    raise PermissionError


def test_trials_of_doctors_that_were_killed_are_removed_and_others_left(tmp_path: Path) -> None:
    for name, age in (("old", STALE_SECONDS + 60), ("new", 0)):
        path = tmp_path / f".raymeld-doctor-{name}"
        path.mkdir()
        (path / "token").touch()
        then = path.stat().st_mtime - age
        os.utime(path, (then, then))

    with trial_directory(locate(tmp_path)):
        pass

    assert list(files_below(tmp_path)) == [".raymeld-doctor-new/token"]


def test_out_lies_in_itself_or_in_what_exists_above_it(tmp_path: Path) -> None:
    assert nearest_directory(locate(tmp_path)) == locate(tmp_path)
    assert nearest_directory(locate(tmp_path / "a" / "b")) == locate(tmp_path)


def test_a_place_that_is_no_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    with (
        pytest.raises(StorageError, match="Not a directory"),
        trial_directory(locate(tmp_path / "file")),
    ):
        pass


def test_a_place_that_one_machine_may_only_read_is_told(tmp_path: Path) -> None:
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode:
        pytest.skip("mounting takes root")
    leave = (
        "import sys, merge_core.reachable as r; print(r.leave_token(r.locate(sys.argv[1]), 'a'))"
    )
    mounted = """
        mount --bind "$1" "$1"
        mount -o remount,bind,ro "$1"
        exec "$0" -c "$2" "$1"
    """
    with trial_directory(locate(tmp_path)) as trial:
        command = ["unshare", "--mount", "sh", "-ec", mounted, sys.executable, str(trial), leave]
        done = subprocess.run(command, capture_output=True, text=True)

    assert (done.returncode, done.stdout) == (0, "Read-only file system\n"), done.stderr

"""Files that lie on a node until they are sent: within bounds, whoever dies."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import NamedTuple

import pytest

from merge_core.errors import StorageError
from merge_core.stores import scratch
from merge_core.stores.scratch import Scratch


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if not path.name.startswith(".")}


def test_a_file_waits_for_room_below_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Scratch(str(tmp_path), 10_000)
    first, waits = place.start("first", 6_000), []

    def sleep(seconds: float) -> None:
        waits.append(names(tmp_path))
        if len(waits) == 2:
            first.discard()

    monkeypatch.setattr(scratch.time, "sleep", sleep)
    second = place.start("second", 6_000)
    third = place.start("third", 4_000)

    assert waits == [{"first.raymeld-part"}] * 2
    assert names(tmp_path) == {"second.raymeld-part", "third.raymeld-part"}
    for part in (second, third):
        part.discard()
    assert names(tmp_path) == set()


def test_a_finished_file_takes_room_until_it_is_discarded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Scratch(str(tmp_path), 10_000)
    first = place.start("first", 6_000)
    first.finish()

    monkeypatch.setattr(scratch.time, "sleep", lambda _: first.discard())
    place.start("second", 6_000).discard()
    first.discard()

    assert names(tmp_path) == set()


def test_what_a_dead_process_left_takes_no_room(tmp_path: Path) -> None:
    (tmp_path / "old.raymeld-part").write_bytes(bytes(9_000))
    (tmp_path / "mine.txt").write_text("stays")
    Scratch(str(tmp_path), None).sweep()
    assert names(tmp_path) == {"mine.txt"}
    (tmp_path / "old.raymeld-part").write_bytes(bytes(9_000))
    part = Scratch(str(tmp_path), 10_000).start("new", 6_000)
    assert names(tmp_path) == {"mine.txt", "new.raymeld-part"}
    part.discard()


def test_what_never_fits_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StorageError, match="6000 bytes are more than --scratch-limit allows"):
        Scratch(str(tmp_path), 5_000).start("large", 6_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, 5_000))
    with pytest.raises(StorageError, match=r"no space: .* give another --scratch"):
        Scratch(str(tmp_path), None).start("large", 6_000)
    assert names(tmp_path) == set()


def test_room_that_others_hold_on_the_disk_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Scratch(str(tmp_path), None)
    first = place.start("first", 6_000)
    free = [5_000, 7_000]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, free.pop(0)))
    monkeypatch.setattr(scratch.time, "sleep", lambda _: None)
    place.start("second", 6_000).discard()
    first.discard()


def test_without_a_folder_it_is_one_of_this_users(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    part = Scratch(None, None).start("one", 100)
    (folder,) = tmp_path.iterdir()
    assert (part.path.parent, folder.stat().st_mode & 0o777) == (folder, 0o700)
    part.discard()

    shutil.rmtree(folder)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    folder.symlink_to(elsewhere)
    with pytest.raises(StorageError, match=r"belongs to somebody else\. Give --scratch"):
        Scratch(None, None).start("one", 100)
    assert list(elsewhere.iterdir()) == []

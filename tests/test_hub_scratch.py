"""Files that lie on a node until they are sent: within bounds, whoever dies."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest

from merge_core.errors import StorageError
from merge_core.stores import scratch
from merge_core.stores.scratch import Scratch


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def names(folder: Path) -> set[str]:
    mine = f".{os.getpid()}.raymeld-part"
    files = (path.name for path in folder.iterdir() if not path.name.startswith("."))
    return {name.replace(mine, ".part") for name in files}


def test_a_file_waits_for_room_below_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    place = Scratch(str(tmp_path), 10_000, said.append)
    first, waits = place.start("first", 6_000), []

    def sleep(seconds: float) -> None:
        waits.append(names(tmp_path))
        if len(waits) == 2:
            first.discard()

    monkeypatch.setattr(scratch.time, "sleep", sleep)
    second = place.start("second", 6_000)
    third = place.start("third", 4_000)

    assert waits == [{"first.part"}] * 2
    whose = f"1 file of process {os.getpid()}"
    assert said == [f"waits for room in {tmp_path}, which holds {whose}"]  # once
    assert names(tmp_path) == {"second.part", "third.part"}
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
    assert names(tmp_path) == {"mine.txt", "new.part"}
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


def test_a_lock_that_another_process_keeps_is_waited_for_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = (tmp_path / ".raymeld-lock").open("w")
    lock.write("4711")
    lock.flush()
    fcntl.flock(lock, fcntl.LOCK_EX)
    said: list[str] = []

    def tell(line: str) -> None:
        said.append(line)
        lock.close()

    now = iter(range(100))
    clock = SimpleNamespace(monotonic=lambda: next(now), sleep=lambda _: None)
    monkeypatch.setattr(scratch, "time", clock)
    (tmp_path / "old.raymeld-part").touch()
    Scratch(str(tmp_path), None).sweep()  # that process does it
    assert names(tmp_path) == {"old.raymeld-part"}

    Scratch(str(tmp_path), None, tell).start("one", 100).discard()

    assert said == [f"waits for {tmp_path}/.raymeld-lock, which process 4711 holds"]
    assert (tmp_path / ".raymeld-lock").read_text() == str(os.getpid())
    assert names(tmp_path) == set()


@pytest.mark.parametrize("name", [".raymeld-lock", "theirs.1.raymeld-part"])
def test_what_another_user_owns_is_told_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (tmp_path / name).touch()
    opened = Path.open

    def refuse(path: Path, *how: Any, **more: Any) -> Any:
        if path.name == name:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return opened(path, *how, **more)

    monkeypatch.setattr(Path, "open", refuse)
    monkeypatch.setattr(Path, "owner", lambda _: "wanda")
    with pytest.raises(StorageError) as raised:
        Scratch(str(tmp_path), None).start("one", 100)
    assert str(raised.value) == (
        f"--scratch {tmp_path}: {tmp_path / name} belongs to user wanda, and may not be written to."
        " Give one of your own"
    )


def test_a_scratch_in_memory_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = Scratch(str(tmp_path / "deep" / "folder"), None)
    kinds = iter(["tmpfs", "ext4", None])
    monkeypatch.setattr(scratch, "file_system_of", lambda _: next(kinds))
    assert place.in_memory == f"{place.folder} is memory, not a disk (tmpfs)"
    assert place.in_memory == place.in_memory == ""
    assert list(tmp_path.iterdir()) == []

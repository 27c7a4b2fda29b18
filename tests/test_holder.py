"""Who has a lease, and whether that is alive, as who only looks can tell."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import psutil
import pytest
from leases import age, move_elsewhere, take

from merge_core.lease import LEASE_SECONDS, Lease, live_holder
from merge_core.stores.local import LocalStore
from merge_core.stores.location import locate

on_linux = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="takes /proc")


@pytest.fixture
def held(tmp_path: Path) -> Iterator[Lease]:
    with take(tmp_path) as one:
        yield one


def test_a_process_of_the_same_number_is_not_the_one_that_held_it(held: Lease) -> None:
    earlier = dataclasses.replace(held.holder, started=held.holder.started - 1)

    assert held.holder.is_alive() is True
    assert earlier.is_alive() is False
    assert dataclasses.replace(earlier, machine="another").is_alive() is None


@pytest.mark.parametrize(
    ("stat", "kill", "alive"),
    [
        (PermissionError, None, None),  # /proc with hidepid=1
        (FileNotFoundError, PermissionError, None),  # hidepid=2: a process of another user
        (FileNotFoundError, ProcessLookupError, False),
    ],
)
@on_linux
def test_a_process_that_is_hidden_is_not_taken_for_dead(
    held: Lease,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stat: type[OSError],
    kill: type[OSError] | None,
    alive: bool | None,
) -> None:
    read = Path.read_bytes

    def read_bytes(path: Path) -> bytes:
        if path.parts[:2] == ("/", "proc"):
            raise stat
        return read(path)

    def send(pid: int, number: int) -> None:
        assert (pid, number) == (os.getpid(), 0)
        if kill is not None:
            raise kill

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    monkeypatch.setattr(os, "kill", send)
    assert held.holder.is_alive() is alive
    assert live_holder(locate(tmp_path)) == (held.holder if alive is None else None)
    age(tmp_path, LEASE_SECONDS + 1)
    assert live_holder(locate(tmp_path)) is None


@on_linux
def test_a_clock_that_is_set_makes_no_live_process_look_gone(
    held: Lease, monkeypatch: pytest.MonkeyPatch
) -> None:
    created = psutil.Process.create_time
    monkeypatch.setattr(psutil.Process, "create_time", lambda process: created(process) + 3600)

    assert held.holder.is_alive() is True


def test_who_only_looks_writes_nothing(
    held: Lease, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(*_: object, **__: object) -> NoReturn:
        raise AssertionError("written")

    move_elsewhere(tmp_path)
    for name in ("put", "create", "delete"):
        monkeypatch.setattr(LocalStore, name, write)
    assert str(live_holder(locate(tmp_path))) == f"process {os.getpid()} on far"
    age(tmp_path, LEASE_SECONDS + 1)
    assert live_holder(locate(tmp_path)) is None
    monkeypatch.undo()

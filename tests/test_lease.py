"""One merge at a time works in a destination, and a crash blocks nobody."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from merge_core import lease
from merge_core.errors import InputError, RaymeldError
from merge_core.lease import LEASE_SECONDS, Lease, holder_of, lease_directory, live_holder


@pytest.fixture
def held(tmp_path: Path) -> Iterator[Lease]:
    with Lease(tmp_path) as one:
        yield one


def newest(out: Path) -> Path:
    return max(lease_directory(out).glob("*.json"))


def age(out: Path, seconds: float) -> None:
    """Make the lease look as if nobody had renewed it for so long."""
    then = newest(out).stat().st_mtime - seconds
    os.utime(newest(out), (then, then))


def move_elsewhere(out: Path) -> None:
    """Make the lease look as if another machine held it."""
    fields = json.loads(newest(out).read_bytes())
    newest(out).write_text(json.dumps({**fields, "machine": "another", "host": "far"}))


def test_a_second_merge_is_refused_and_told_who_is_at_work(held: Lease, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"process {os.getpid()} on .* is merging into it"):
        Lease(tmp_path)

    assert holder_of(tmp_path) == live_holder(tmp_path) == held.holder


def test_a_released_lease_is_free_at_once(tmp_path: Path) -> None:
    for _ in range(3):
        with Lease(tmp_path) as one:
            assert holder_of(tmp_path) == one.holder
        assert holder_of(tmp_path) is None

    assert len(list(lease_directory(tmp_path).iterdir())) == 1


def test_a_merge_that_was_killed_on_this_machine_blocks_nobody(tmp_path: Path) -> None:
    code = "import sys, time; from pathlib import Path; from merge_core.lease import Lease\n"
    code += "Lease(Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        with pytest.raises(InputError, match=f"process {process.pid} "):
            Lease(tmp_path)
        process.send_signal(signal.SIGKILL)

    with Lease(tmp_path) as one:
        assert holder_of(tmp_path) == one.holder


def test_a_process_of_the_same_number_is_not_the_one_that_held_it(held: Lease) -> None:
    assert not held.holder.is_gone()
    assert dataclasses.replace(held.holder, born=held.holder.born - 1).is_gone()


def test_a_lease_of_another_machine_is_free_only_when_nobody_renews_it(
    held: Lease, tmp_path: Path
) -> None:
    move_elsewhere(tmp_path)
    age(tmp_path, LEASE_SECONDS / 2)
    with pytest.raises(InputError, match=r"on far .* try again in 2\d s"):
        Lease(tmp_path)
    age(tmp_path, LEASE_SECONDS)

    with Lease(tmp_path) as later:
        with pytest.raises(RaymeldError, match="another merge has taken this directory over"):
            held.renew()
        assert holder_of(tmp_path) == later.holder


def test_one_that_slept_cannot_renew_behind_the_back_of_its_successor(
    held: Lease, tmp_path: Path
) -> None:
    age(tmp_path, LEASE_SECONDS + 1)
    move_elsewhere(tmp_path)
    age(tmp_path, LEASE_SECONDS + 1)
    with Lease(tmp_path) as later:
        for _ in range(3):  # the numbers that the sleeper would take next are free again
            later.renew()

        with pytest.raises(RaymeldError, match="taken this directory over"):
            held.renew()
        later.renew()
        assert holder_of(tmp_path) == later.holder
        held.release()
        assert holder_of(tmp_path) == later.holder


def test_a_renewed_lease_is_young_and_leaves_no_files_behind(held: Lease, tmp_path: Path) -> None:
    age(tmp_path, LEASE_SECONDS + 1)
    held.renew()

    assert live_holder(tmp_path) == held.holder
    assert len(list(lease_directory(tmp_path).iterdir())) == 1


def test_it_is_renewed_while_it_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    renewed = threading.Event()
    monkeypatch.setattr(lease, "RENEW_SECONDS", 0.001)

    class Watched(Lease):
        def renew(self) -> None:
            super().renew()
            renewed.set()

    with Watched(tmp_path) as one:
        assert renewed.wait(30)
        assert holder_of(tmp_path) == one.holder


def test_a_lease_whose_writing_was_cut_short_counts_until_it_is_old(tmp_path: Path) -> None:
    lease_directory(tmp_path).mkdir(parents=True)
    (lease_directory(tmp_path) / "00000003.json").touch()
    with pytest.raises(InputError, match="unknown machine"):
        Lease(tmp_path)
    age(tmp_path, LEASE_SECONDS + 1)

    with Lease(tmp_path) as one:
        assert holder_of(tmp_path) == one.holder


@given(st.integers(2, 6))
def test_of_several_at_once_exactly_one_gets_it(
    tmp_path_factory: pytest.TempPathFactory, rivals: int
) -> None:
    out = tmp_path_factory.mktemp("race")
    start = threading.Barrier(rivals)

    def attempt(_: int) -> Lease | None:
        start.wait()
        try:
            return Lease(out)
        except InputError:
            return None

    with ThreadPoolExecutor(rivals) as pool:
        winners = [one for one in pool.map(attempt, range(rivals)) if one is not None]
    assert [holder_of(out)] == [one.holder for one in winners]
    for one in winners:
        one.release()

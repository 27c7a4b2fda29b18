"""One merge at a time works in a destination, and a crash blocks nobody."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from leases import age, lease_directory, move_elsewhere, take, take_over, unheard

from merge_core import lease
from merge_core.errors import InputError, LeaseLostError, StorageError
from merge_core.lease import LEASE_SECONDS, Lease, holder_of, live_holder
from merge_core.stores.location import locate
from merge_core.stores.objects import ObjectsStore


@pytest.fixture
def held(tmp_path: Path) -> Iterator[Lease]:
    with take(tmp_path) as one:
        yield one


def test_a_second_merge_is_refused_and_told_who_is_at_work(held: Lease, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"process {os.getpid()} on .* is merging into it"):
        take(tmp_path)

    assert holder_of(locate(tmp_path)) == live_holder(locate(tmp_path)) == held.holder


def test_a_released_lease_is_free_at_once(tmp_path: Path) -> None:
    for _ in range(3):
        with take(tmp_path) as one:
            assert holder_of(locate(tmp_path)) == one.holder
        assert holder_of(locate(tmp_path)) is None

    assert len(list(lease_directory(tmp_path).iterdir())) == 1


def test_a_merge_that_was_killed_on_this_machine_blocks_nobody(tmp_path: Path) -> None:
    code = "import sys; from merge_core.lease import Lease\n"
    code += "from merge_core.stores.location import locate\n"
    code += "Lease(locate(sys.argv[1]), print); print('held', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        with pytest.raises(InputError, match=f"process {process.pid} "):
            take(tmp_path)
        process.send_signal(signal.SIGKILL)

    with take(tmp_path) as one:
        assert holder_of(locate(tmp_path)) == one.holder


def test_a_lease_of_another_machine_that_is_old_is_free_at_once(
    held: Lease, tmp_path: Path
) -> None:
    with take_over(tmp_path) as later:
        with pytest.raises(LeaseLostError, match="another merge has taken OUT over"):
            held.renew()
        assert holder_of(locate(tmp_path)) == later.holder


def test_one_that_slept_cannot_renew_behind_the_back_of_its_successor(
    held: Lease, tmp_path: Path
) -> None:
    with take_over(tmp_path) as later:
        for _ in range(3):  # the numbers that the sleeper would take next are free again
            later.renew()

        with pytest.raises(LeaseLostError, match="taken OUT over"):
            held.renew()
        later.renew()
        assert holder_of(locate(tmp_path)) == later.holder
        held.release()
        assert holder_of(locate(tmp_path)) == later.holder


@pytest.mark.parametrize("unanswered", ["create", "list"])
@pytest.mark.parametrize("after", ["renew", "release"])
def test_a_renewal_that_was_done_and_not_answered_is_ours(
    monkeypatch: pytest.MonkeyPatch, unanswered: str, after: str
) -> None:
    out = locate(f"memory://lease/{unanswered}-{after}")
    honest = getattr(ObjectsStore, unanswered)

    def lose_answer(store: ObjectsStore, *what: object) -> object:
        honest(store, *what)
        raise StorageError("no answer", str(out))

    with Lease(out, unheard) as held:
        with monkeypatch.context() as patch:
            patch.setattr(ObjectsStore, unanswered, lose_answer)
            with pytest.raises(StorageError, match="no answer"):
                held.renew()
        if after == "renew":
            held.renew()
            assert holder_of(out) == held.holder
            held.renew()
    assert holder_of(out) is None


def test_a_renewed_lease_is_young_and_leaves_no_files_behind(held: Lease, tmp_path: Path) -> None:
    age(tmp_path, LEASE_SECONDS + 1)
    held.renew()

    assert live_holder(locate(tmp_path)) == held.holder
    assert len(list(lease_directory(tmp_path).iterdir())) == 1


def test_it_is_renewed_while_it_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    renewed = threading.Event()
    monkeypatch.setattr(lease, "RENEW_SECONDS", 0.001)

    class Watched(Lease):
        def renew(self) -> None:
            super().renew()
            renewed.set()

    with Watched(locate(tmp_path), unheard) as one:
        assert renewed.wait(30)
        assert holder_of(locate(tmp_path)) == one.holder


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """What a lease that waits takes for the time."""
    clock = Clock()
    monkeypatch.setattr(lease, "time", clock)
    return clock


class Clock:
    """Passes only while somebody sleeps; ``events`` happen when their time has come."""

    def __init__(self) -> None:
        self.now = 0.0
        self.events: dict[float, Callable[[], object]] = {}

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        for due in [at for at in self.events if at <= self.now]:
            self.events.pop(due)()


@pytest.fixture
def heard() -> list[str]:
    return []


def test_a_lease_that_nobody_renews_is_waited_for(
    held: Lease, tmp_path: Path, clock: Clock, heard: list[str]
) -> None:
    move_elsewhere(tmp_path)
    age(tmp_path, LEASE_SECONDS - 20)

    with take(tmp_path, heard.append) as later:
        assert holder_of(locate(tmp_path)) == later.holder
    (waiting,) = heard  # a little less on a machine that is busy
    assert re.fullmatch(
        rf"waiting (1\d|20) s for .* process {os.getpid()} on far to expire", waiting
    )
    assert 19 <= clock.now <= 21


def test_whoever_waits_is_refused_at_the_first_renewal(
    held: Lease, tmp_path: Path, clock: Clock, heard: list[str]
) -> None:
    def renew() -> None:
        held.renew()
        move_elsewhere(tmp_path)

    move_elsewhere(tmp_path)
    clock.events[7.0] = renew

    with pytest.raises(InputError, match=r"process \d+ on far is merging into it"):
        take(tmp_path, heard.append)
    assert len(heard) == 1
    assert clock.now == 7


def test_whoever_waits_gets_a_lease_that_is_released(
    held: Lease, tmp_path: Path, clock: Clock
) -> None:
    move_elsewhere(tmp_path)
    clock.events[3.0] = held.release

    with take(tmp_path) as later:
        assert holder_of(locate(tmp_path)) == later.holder
    assert clock.now == 3


def test_a_lease_from_the_future_counts_as_just_renewed(
    held: Lease, tmp_path: Path, clock: Clock, heard: list[str]
) -> None:
    move_elsewhere(tmp_path)
    age(tmp_path, -204_337_353)

    with take(tmp_path, heard.append) as later:
        assert holder_of(locate(tmp_path)) == later.holder
    assert heard[0].startswith(f"waiting {LEASE_SECONDS:.0f} s for")
    assert clock.now == LEASE_SECONDS


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 160,
        b"\xff\xfe\xfd",
        b'{"run": "a", "ho',
        b"[]",
        b"7",
        b"{}",
        b'{"run": "a", "host": "b", "machine": "c", "pid": 1}',
        b'{"run": "a", "host": "b", "machine": "c", "pid": 1, "started": 1.0, "more": 2}',
    ],
)
def test_a_lease_that_cannot_be_read_counts_until_it_is_old(
    tmp_path: Path, clock: Clock, heard: list[str], content: bytes
) -> None:
    lease_directory(tmp_path).mkdir(parents=True)
    (lease_directory(tmp_path) / "00000003.json").write_bytes(content)
    age(tmp_path, 5)
    seen = live_holder(locate(tmp_path))

    with take(tmp_path, heard.append) as one:
        assert holder_of(locate(tmp_path)) == one.holder
    assert str(seen) == "an unknown machine"
    (waiting,) = heard
    assert re.fullmatch(
        r"waiting (3\d|40) s for the lease of an unknown machine to expire", waiting
    )


@pytest.mark.parametrize("below", [False, True], ids=["alone", "above a lease"])
def test_a_name_that_cannot_be_opened_blocks_nobody(
    tmp_path: Path, clock: Clock, heard: list[str], below: bool
) -> None:
    if below:
        take(tmp_path).release()
    lease_directory(tmp_path).mkdir(parents=True, exist_ok=True)
    (lease_directory(tmp_path) / "00000009.json").symlink_to("nowhere")

    with take(tmp_path, heard.append) as one:
        assert holder_of(locate(tmp_path)) == one.holder
    (waiting,) = heard
    assert re.fullmatch(r"waiting 4[0-5] s for the lease of an unknown machine to expire", waiting)
    assert len(list(lease_directory(tmp_path).iterdir())) == 1


def test_a_file_handle_that_is_stale_is_looked_at_anew(
    held: Lease, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stale = iter([True] * (lease.LISTINGS - 1) + [False])
    read = Path.read_bytes

    def read_bytes(path: Path) -> bytes:
        if next(stale):
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    assert holder_of(locate(tmp_path)) == held.holder


@given(st.integers(2, 6))
def test_of_several_at_once_exactly_one_gets_it(
    tmp_path_factory: pytest.TempPathFactory, rivals: int
) -> None:
    out = tmp_path_factory.mktemp("race")
    start = threading.Barrier(rivals)

    def attempt(_: int) -> Lease | None:
        start.wait()
        try:
            return take(out)
        except InputError:
            return None

    with (
        ThreadPoolExecutor(rivals) as pool,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(lease, "LOOK_SECONDS", 0.001)  # a file that is half written is looked at anew
        winners = [one for one in pool.map(attempt, range(rivals)) if one is not None]
    assert [holder_of(locate(out))] == [one.holder for one in winners]
    for one in winners:
        one.release()

"""A store that is gone holds no end of a merge up, and no process."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator

import pytest
from backends import DATA
from fault_proxy import Fault, FaultProxy
from handmade import TWO_LANES
from leases import unheard
from network_faults import stall
from s3_server import uploads

from cluster.driver import _stopped_parts
from merge_core import background
from merge_core.errors import RaymeldError, StorageError
from merge_core.lease import Lease
from merge_core.merge import merge
from merge_core.plan import MergePlan
from merge_core.planner import make_plan
from merge_core.progress import Progress
from merge_core.stores import last_writes
from merge_core.stores.gcs import GcsStore
from merge_core.stores.last_writes import write_last
from merge_core.stores.location import locate
from merge_core.stores.opening import open_store
from merge_core.stores.s3 import S3Store

A, B = (locate(f"memory://{name}/out") for name in "ab")

ENDS_SOON = 5.0
"""Seconds; a stalled answer alone is waited for 25 s, ten times."""


@pytest.fixture
def gone(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """What a store that is gone waits for, in vain until it is set."""
    monkeypatch.setattr(last_writes, "SECONDS", 0.05)
    back = threading.Event()
    yield back
    back.set()


def test_what_takes_too_long_is_left_to_itself_and_nothing_after_it_is_waited_for(
    gone: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[int] = []
    ended = threading.Event()
    write_last(A, lambda: gone.wait() and done.append(1))
    monkeypatch.setattr(last_writes, "SECONDS", 1000.0)

    write_last(A, lambda: done.append(2))
    write_last(A, ended.set)
    write_last(B, lambda: done.append(3))
    assert done == [3]

    gone.set()
    assert ended.wait(ENDS_SOON)
    assert done == [3, 1, 2]
    write_last(A, lambda: done.append(4))  # waited for again
    assert done == [3, 1, 2, 4]


def test_only_failures_of_a_store_are_no_errors() -> None:
    def fail(error: Exception) -> None:
        raise error

    write_last(A, lambda: fail(StorageError("full")))
    with pytest.raises(ZeroDivisionError):
        write_last(A, lambda: fail(ZeroDivisionError()))


def test_python_ends_while_a_last_write_is_under_way() -> None:
    code = """
        import threading
        from merge_core.stores import last_writes
        from merge_core.stores.location import locate
        last_writes.SECONDS = 0.05
        last_writes.write_last(locate("memory://a/out"), threading.Event().wait)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, timeout=60)


def test_a_merge_that_loses_its_s3_ends_with_its_own_error_and_soon(
    small: MergePlan, s3_store: S3Store, s3_proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(last_writes, "SECONDS", 0.05)
    out, began = s3_store.location, list[float]()

    def lose(progress: Progress) -> None:
        if progress.phase == "verifying" and not began:
            s3_proxy.faults(Fault(stall(), times=None))
            began.append(time.monotonic())
            raise RaymeldError("stopped")

    with pytest.raises(RaymeldError, match="stopped"):
        merge(small, out, choice=TWO_LANES, watch=lose)
    assert time.monotonic() - began[0] < ENDS_SOON


@pytest.mark.parametrize(
    ("method", "path"),
    [("PUT", "partNumber="), ("GET", "/base/model.*safetensors"), ("POST", "uploadId=")],
    ids=["a part", "a read", "a publication"],
)
def test_who_stops_a_merge_does_not_wait_for_answers_of_a_store_that_is_gone(
    small: MergePlan,
    s3_store: S3Store,
    s3_proxy: FaultProxy,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    path: str,
) -> None:
    monkeypatch.setattr(last_writes, "SECONDS", 0.05)
    monkeypatch.setattr(background, "LEAVE_SECONDS", 0.05)
    base = s3_store.location / "base"
    for file in small.base.local.iterdir():
        open_store(base).put(file.name, file.read_bytes())
    plan = make_plan(base, [small.adapters[0].path], shard_bytes=18_000, access=base.access)
    began = list[float]()

    def lose(progress: Progress) -> None:
        if progress.phase == "merging" and not began:
            s3_proxy.faults(Fault(stall(), times=None))
            began.append(time.monotonic())
            raise KeyboardInterrupt

    # Of reads the first is one of headers, before the merge begins.
    s3_proxy.faults(Fault(stall(), method=method, path=path, skip=method == "GET", times=None))
    with pytest.raises(KeyboardInterrupt):
        merge(plan, s3_store.location / "result", choice=TWO_LANES, watch=lose)
    assert time.monotonic() - began[0] < ENDS_SOON


def test_a_driver_that_loses_its_s3_does_not_wait_for_the_parts_of_its_workers(
    s3_store: S3Store, s3_proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = s3_store.location
    with Lease(out, unheard) as lease:
        s3_store.start("model.safetensors", 10, "1-a")
        with _stopped_parts(out, lease.holder.run):
            assert uploads(out) == ["out/model.safetensors"]
        assert uploads(out) == []
        monkeypatch.setattr(last_writes, "SECONDS", 0.05)
        s3_proxy.faults(Fault(stall(), times=None))
        began = time.monotonic()
        with _stopped_parts(out, lease.holder.run):
            pass
    assert time.monotonic() - began < ENDS_SOON


@pytest.mark.parametrize("method", ["POST", "DELETE"], ids=["under way", "removed"])
def test_a_part_in_gcs_whose_store_is_gone_is_discarded_soon(
    gs_store: GcsStore, gs_proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    monkeypatch.setattr(last_writes, "SECONDS", 0.05)
    gs_proxy.faults(Fault(stall(), method=method, times=None))
    part = gs_store.start("model", len(DATA), "1-a")
    part.write(memoryview(DATA), 0)
    if method == "DELETE":
        part.finish()
    began = time.monotonic()
    part.discard()
    assert time.monotonic() - began < ENDS_SOON


def test_a_part_whose_store_is_gone_is_discarded_soon(
    s3_store: S3Store, s3_proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(last_writes, "SECONDS", 0.05)
    part = s3_store.start("model.safetensors", 10, "1-a")
    s3_proxy.faults(Fault(stall(), method="DELETE", times=None))
    began = time.monotonic()
    part.discard()
    assert time.monotonic() - began < ENDS_SOON

"""What only S3 has: uploads that outlive their process, copies by the server, a limit of parts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor

import pytest
from backends import DATA, written
from fault_proxy import FaultProxy
from s3_server import uploads

from merge_core.errors import StorageError
from merge_core.stores import s3_copy, s3_parts
from merge_core.stores.location import Location
from merge_core.stores.s3 import S3Store

WRITER = """
    import sys
    from merge_core.stores import s3_parts
    from merge_core.stores.location import Access, locate
    from merge_core.stores.s3 import S3Store

    s3_parts.PART_BYTES = 64 << 10
    store = S3Store(locate(sys.argv[1], Access(endpoint_url=sys.argv[2])))
    part = store.start("model.safetensors", 200_000, "1-a")
    part.write(memoryview(bytes(150_000)), 0)
    print("two of four parts are there", flush=True)
    sys.stdin.read()
"""


def test_a_killed_writer_leaves_no_object_and_the_next_sweep_ends_its_upload(s3: Location) -> None:
    command = [
        sys.executable,
        "-c",
        textwrap.dedent(WRITER),
        str(s3 / "out"),
        s3.access.endpoint_url,
    ]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline()
        os.kill(writer.pid, signal.SIGKILL)
    store = S3Store(s3 / "out")
    assert list(store.list()) == []
    assert uploads(s3) == ["out/model.safetensors"]

    store.sweep()
    assert uploads(s3) == []


def test_a_sweep_ends_no_uploads_beside_or_below_the_folder_or_of_longer_names(
    s3: Location,
) -> None:
    store, beside = S3Store(s3 / "out"), S3Store(s3 / "out2")
    S3Store(s3 / "out" / "other").start("model", 1, "1-a")
    for name in ("model", "model2"):
        store.start(name, 1, "1-a")
    beside.start("model", 1, "1-a")

    store.sweep("model")
    assert uploads(s3) == ["out/model2", "out/other/model", "out2/model"]
    store.sweep()
    assert uploads(s3) == ["out/other/model", "out2/model"]


def test_what_publishes_may_be_another_process(s3: Location) -> None:
    part = written(S3Store(s3 / "out"), "model")
    publish = f"""
        from merge_core.stores.location import Access, locate
        from merge_core.stores.s3 import S3Store

        store = S3Store(locate("{s3 / "out"}", Access(endpoint_url="{s3.access.endpoint_url}")))
        store.publish("{part}", "model", {len(DATA)})
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(publish)], check=True)
    assert S3Store(s3 / "out").get("model") == DATA


def test_an_unchanged_file_is_copied_by_the_server(
    s3_store: S3Store, s3_proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_copy, "COPY_BYTES", 100_000)
    base = S3Store(s3_store.location / "base")
    base.put("model", DATA)
    s3_proxy.forget()
    part = s3_store.copy(base.location, base.look("model"), "model", "1-a").finish()
    assert [found.name for found in s3_store.list()] == ["base/model"]
    s3_store.publish(part, "model", len(DATA))
    passed = s3_proxy.tally()
    assert (passed.received < 2000, passed.sent < 10_000) == (True, True)
    assert s3_store.get("model") == DATA


def test_a_file_that_was_replaced_is_not_copied(s3_store: S3Store) -> None:
    base = S3Store(s3_store.location / "base")
    base.put("model", DATA)
    pinned = base.look("model")
    base.put("model", DATA[::-1])
    with pytest.raises(StorageError, match="base/model: the file changed"):
        s3_store.copy(base.location, pinned, "model", "1-a")
    assert uploads(s3_store.location) == []


def test_a_writer_takes_about_two_parts_a_lane(s3_store: S3Store) -> None:
    part = s3_store.start("model", 16 * len(DATA), "1-a")
    lanes, piece = 4, 30_000
    starts = iter(range(0, 16 * len(DATA), piece))
    data = memoryview(DATA * 16)

    def lane() -> None:
        for start in starts:  # an iterator of a range may be shared
            part.write(data[start : start + piece], start)

    with ThreadPoolExecutor(lanes) as threads:
        for running in [threads.submit(lane) for _ in range(lanes)]:
            running.result()
    part.finish()
    assert 1 <= len(part._spare) <= 2 * lanes
    assert part._gaps == {}
    assert {len(buffer) for buffer in part._spare} == {s3_parts.PART_BYTES}


@pytest.mark.parametrize(
    ("size", "expected"), [(1, 8 << 20), (80 << 30, 9 << 20), (5 << 40, 525 << 20)]
)
def test_parts_are_as_many_as_s3_takes(size: int, expected: int) -> None:
    assert s3_parts.part_bytes(size, s3_parts.PART_BYTES) == expected
    assert -(-size // expected) <= s3_parts.MOST_PARTS
    assert expected >= 5 << 20, "less only of the last"

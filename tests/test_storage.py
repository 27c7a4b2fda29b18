"""Local files: any range read, any pattern written, nothing half written, nothing left open."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import mmap
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from merge_core import carrying, storage
from merge_core.carrying import carry
from merge_core.errors import StorageError
from merge_core.layout import ALIGNMENT
from merge_core.plan import SideFile
from merge_core.storage import (
    SLACK,
    PartFile,
    RangeReader,
    write_durably,
)
from merge_core.stores.local import LocalStore
from merge_core.stores.location import locate
from merge_core.stores.opening import check_unchanged

SIZE = 5 * ALIGNMENT + 123
CONTENT = Random(7).randbytes(SIZE)
OPENED = {"direct": storage._DIRECT, "buffered": 0}


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("storage") / "stored"
    path.write_bytes(CONTENT)
    return path


@pytest.fixture(params=OPENED.values(), ids=OPENED.keys())
def opened(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(storage, "_DIRECT", request.param)
    monkeypatch.setattr(storage, "DIRECT_MIN_BYTES", 1)
    return int(request.param)


def pages(nbytes: int) -> memoryview:
    """Memory that starts on a page."""
    return memoryview(mmap.mmap(-1, max(nbytes, 1)))


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def refuse_direct(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Have direct reads or writes fail as on file systems that open O_DIRECT and cannot do it."""
    real = getattr(os, name)

    def call(descriptor: int, *rest: Any) -> Any:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, "no")
        return real(descriptor, *rest)

    monkeypatch.setattr(os, name, call)


def fail_at(call: int, real: Callable[..., Any]) -> Callable[..., Any]:
    """``real``, but its ``call``-th call finds the disk broken."""
    calls: Iterator[int] = iter(range(1, 1000))

    def function(*args: Any) -> Any:
        if next(calls) == call:
            raise OSError(errno.EIO, "broken disk")
        return real(*args)

    return function


@pytest.mark.parametrize("direct", OPENED.values(), ids=OPENED.keys())
@settings(max_examples=150, derandomize=True, deadline=None)
@given(offset=st.integers(0, SIZE), wanted=st.integers(0, SIZE), least=st.sampled_from([1, 5000]))
def test_any_range_is_what_a_plain_read_gives(
    stored: Path, direct: int, offset: int, wanted: int, least: int
) -> None:
    nbytes = min(wanted, SIZE - offset)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "_DIRECT", direct)
        patch.setattr(storage, "DIRECT_MIN_BYTES", least)
        reader = RangeReader(stored)
        got = bytes(reader.read_into(pages(nbytes + SLACK), offset, nbytes))
        cached = bytes(reader.read(offset, nbytes))
        reader.close()

    assert got == CONTENT[offset : offset + nbytes]
    assert cached == got


def test_threads_share_a_reader(stored: Path, opened: int) -> None:
    reader = RangeReader(stored)

    def read(offset: int) -> bytes:
        return bytes(reader.read_into(pages(1000 + SLACK), offset, 1000))

    offsets = range(0, SIZE - 1000, 97)
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(read, offsets))
    reader.close()

    assert got == [CONTENT[offset : offset + 1000] for offset in offsets]


def test_a_file_that_shrank_is_named(tmp_path: Path, opened: int) -> None:
    path = tmp_path / "shrinking"
    path.write_bytes(CONTENT)
    reader = RangeReader(path)
    os.truncate(path, SIZE - 1)

    with pytest.raises(StorageError, match="changed while it was being merged") as caught:
        reader.read_into(pages(SIZE + SLACK), 8, SIZE - 8)
    reader.close()

    assert caught.value.where == str(path)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="No such file") as caught:
        RangeReader(tmp_path / "absent")

    assert caught.value.where == str(tmp_path / "absent")


@pytest.mark.parametrize("direct", OPENED.values(), ids=OPENED.keys())
@settings(max_examples=40, derandomize=True, deadline=None)
@given(
    whole=st.lists(st.integers(1, 4), max_size=6),
    odd=st.lists(st.integers(0, 9000), max_size=6),
    seed=st.integers(0, 99),
)
def test_pieces_written_in_any_order_by_any_thread_give_exactly_those_bytes(
    tmp_path_factory: pytest.TempPathFactory,
    direct: int,
    whole: list[int],
    odd: list[int],
    seed: int,
) -> None:
    sizes = [ALIGNMENT * n for n in whole] + odd
    total = sum(sizes)
    content = pages(total)
    content[:total] = Random(seed).randbytes(total)
    pieces = [(sum(sizes[:n]), size) for n, size in enumerate(sizes)]
    Random(seed).shuffle(pieces)
    path = tmp_path_factory.mktemp("parts") / "part"
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(4) as pool:
        patch.setattr(storage, "_DIRECT", direct)
        part = PartFile(path, total)
        list(pool.map(lambda p: part.write(content[p[0] : p[0] + p[1]], p[0]), pieces))
    part.finish()

    assert path.read_bytes() == bytes(content[:total])


def test_a_part_has_its_size_from_the_start_and_small_writes_land_where_told(
    tmp_path: Path,
) -> None:
    part = PartFile(tmp_path / "part", 10_000)
    assert (tmp_path / "part").stat().st_size == 10_000
    part.write_small(b"middle", 4_321)
    part.finish()

    assert (tmp_path / "part").read_bytes() == bytes(4_321) + b"middle" + bytes(10_000 - 4_327)


def test_a_part_never_opens_a_file_that_exists(tmp_path: Path) -> None:
    (tmp_path / "part").write_bytes(b"somebody's")

    with pytest.raises(StorageError, match="exists"):
        PartFile(tmp_path / "part", 3)

    assert (tmp_path / "part").read_bytes() == b"somebody's"


def test_a_full_disk_is_told_before_the_work_and_leaves_no_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = descriptors()
    monkeypatch.setattr(storage, "_allocate", fail_at(1, lambda *_: None))

    with pytest.raises(StorageError, match="broken disk"):
        PartFile(tmp_path / "part", 10)

    assert list(tmp_path.iterdir()) == []
    assert descriptors() == before


def test_no_space_says_to_free_some() -> None:
    with (
        pytest.raises(StorageError, match="Free space there"),
        storage.reported(Path("there")),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_an_identity_notices_another_size_and_another_time(tmp_path: Path) -> None:
    path, folder = tmp_path / "file", locate(tmp_path)
    path.write_bytes(b"12345")
    identity = LocalStore(folder).look("file")
    check_unchanged(folder, identity)

    os.utime(path, ns=(0, int(identity.pin) + 1))
    with pytest.raises(StorageError, match="changed") as caught:
        check_unchanged(folder, identity)
    assert caught.value.where == str(path)

    path.write_bytes(b"123456")
    os.utime(path, ns=(0, int(identity.pin)))
    with pytest.raises(StorageError, match="changed"):
        check_unchanged(folder, identity)

    path.unlink()
    with pytest.raises(StorageError, match="No such file"):
        check_unchanged(folder, identity)


@pytest.mark.parametrize(
    ("function", "call", "kept"),
    [("fsync", 1, b"old"), ("pwrite", 1, b"old"), ("rename", 1, b"old"), ("fsync", 2, b"new")],
)
def test_a_durable_write_that_fails_leaves_the_old_content_or_all_of_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, call: int, kept: bytes
) -> None:
    path = tmp_path / "file"
    write_durably(path, b"old")
    before = descriptors()
    with monkeypatch.context() as patch:
        patch.setattr(os, function, fail_at(call, getattr(os, function)))
        with pytest.raises(StorageError, match="broken disk"):
            write_durably(path, b"new")

    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"file": kept}
    assert descriptors() == before

    write_durably(path, b"newer")
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"file": b"newer"}


@pytest.mark.parametrize("size", [0, 10, 25])
def test_a_side_file_is_carried_whole_and_one_that_is_gone_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    monkeypatch.setattr(carrying, "BLOCK_BYTES", 12)
    source, target = locate(tmp_path / "source"), locate(tmp_path / "target")
    source.local.mkdir()
    data = bytes(range(size))
    (source.local / "a.json").write_bytes(data)
    side = SideFile(name="b.json", folder=source, file=LocalStore(source).look("a.json"))

    assert carry(side, target) == hashlib.sha256(data).hexdigest()
    assert (target.local / "b.json").read_bytes() == data

    (source.local / "a.json").unlink()
    with pytest.raises(StorageError, match=f"{source}/a.json"):
        carry(side, target)
    assert (target.local / "b.json").read_bytes() == data


def test_every_descriptor_is_closed(tmp_path: Path, stored: Path, opened: int) -> None:
    before = descriptors()
    reader = RangeReader(stored)
    reader.read_into(pages(SIZE + SLACK), 0, SIZE)
    reader.close()
    for name, close in (("kept", PartFile.finish), ("dropped", PartFile.discard)):
        part = PartFile(tmp_path / name, SIZE)
        part.write(pages(SIZE), 0)
        close(part)
    write_durably(tmp_path / "durable", b"x")

    assert descriptors() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["durable", "kept"]


@pytest.mark.skipif(not storage._DIRECT, reason="no O_DIRECT here")
def test_a_file_system_that_refuses_direct_io_at_the_first_use_costs_no_byte_and_no_descriptor(
    tmp_path: Path, stored: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "DIRECT_MIN_BYTES", 1)
    refuse_direct(monkeypatch, "preadv")
    refuse_direct(monkeypatch, "pwrite")
    before = descriptors()
    reader, part = RangeReader(stored), PartFile(tmp_path / "part", SIZE)
    content = pages(SIZE + SLACK)
    part.write(reader.read_into(content, 0, SIZE), 0)
    reader.close()
    part.finish()

    assert (tmp_path / "part").read_bytes() == CONTENT
    assert descriptors() == before


@pytest.mark.parametrize("write", ["write", "write_small"])
def test_a_write_under_way_when_its_part_is_discarded_does_not_go_on_in_another_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: str
) -> None:
    part, others = PartFile(tmp_path / "part", SIZE), list[Any]()
    pwrite = os.pwrite

    def short(descriptor: int, data: memoryview, offset: int) -> int:
        done = pwrite(descriptor, data[:ALIGNMENT], offset)
        if not others:
            part.discard()
            others.extend((tmp_path / name).open("xb") for name in ("a", "b"))
            assert descriptor in [other.fileno() for other in others]
        return done

    monkeypatch.setattr(os, "pwrite", short)
    with pytest.raises(StorageError, match="part: Bad file descriptor"):
        getattr(part, write)(pages(2 * ALIGNMENT), 0)

    assert [os.fstat(other.fileno()).st_size for other in others] == [0, 0]
    for other in others:
        other.close()

"""What every store keeps of the promises in ``merge_core.stores.store``.

A backend joins by a line in ``BACKENDS``.
"""

from __future__ import annotations

import itertools
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from merge_core.errors import AbsentError, StorageError
from merge_core.stores import blocks, object_parts, s3_parts
from merge_core.stores.location import Location
from merge_core.stores.objects import ObjectsStore
from merge_core.stores.s3 import S3Store
from merge_core.stores.store import PARTS, FileIdentity, PartWriter, Reader, Store

FOLDERS = itertools.count()

BACKENDS: dict[str, Callable[[pytest.FixtureRequest], Callable[[], Store]]] = {
    "memory": lambda _: lambda: ObjectsStore(Location(scheme="memory", root=f"m{next(FOLDERS)}")),
    "s3": lambda request: lambda: S3Store(request.getfixturevalue("s3") / f"f{next(FOLDERS)}"),
}

WINDOW = 256 << 10
"""Bytes within which the writes of a test come in any order."""


@pytest.fixture(params=BACKENDS)
def make_store(request: pytest.FixtureRequest) -> Callable[[], Store]:
    """Makes stores that hold nothing."""
    return BACKENDS[request.param](request)


@pytest.fixture
def store(make_store: Callable[[], Store]) -> Store:
    return make_store()


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts, blocks and windows of which a small file has several."""
    monkeypatch.setattr(s3_parts, "PART_BYTES", 64 << 10)
    monkeypatch.setattr(object_parts, "CHUNK_BYTES", 64 << 10)
    monkeypatch.setattr(object_parts, "WINDOW_BYTES", WINDOW)
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 100_000)


def content(size: int, seed: int = 0) -> bytes:
    """Bytes of which no two pages are the same."""
    return b"".join(b"%08x" % (seed * 1_000_003 + at) for at in range(-(-size // 8)))[:size]


def names(store: Store, below: str = "") -> set[str]:
    return {found.name for found in store.list(below)}


def written(store: Store, name: str, data: bytes, attempt: str = "1-a") -> str:
    """A finished part."""
    part = store.start(name, len(data), attempt)
    part.write(memoryview(data), 0)
    return part.finish()


def read(store: Store, name: str) -> bytes:
    """Through a reader."""
    file = store.look(name)
    reader = store.open(file)
    data = bytes(reader.read(0, file.size))
    reader.close()
    return data


def test_a_file_that_was_put_is_there(store: Store) -> None:
    store.put("a.json", b"first")
    before = store.look("a.json")
    store.put("a.json", b"later")

    assert store.get("a.json") == b"later"
    assert before == FileIdentity(name="a.json", size=5, pin=before.pin)
    assert store.look("a.json").pin != before.pin
    [found] = store.list()
    assert (found.name, found.size) == ("a.json", 5)
    assert found.modified > 1.7e9


def test_a_file_that_is_not_there_is_said_to_be_absent(store: Store) -> None:
    ghost = FileIdentity(name="a.json", size=1, pin="1")
    for ask in (store.look, store.get):
        with pytest.raises(AbsentError, match=r"a[.]json"):
            ask("a.json")
    with pytest.raises(AbsentError, match=r"a[.]json"):
        store.open(ghost)
    store.delete("a.json")
    assert names(store) == set()


def test_a_deleted_file_is_absent(store: Store) -> None:
    store.put("a", b"x")
    store.delete("a")
    with pytest.raises(AbsentError):
        store.look("a")


def test_lists_hold_what_is_in_a_folder_and_nothing_beside_it(store: Store) -> None:
    beside = type(store)(location=_sibling(store.location))
    for name in ("a", "b/c", "b/d/e", "b2/f"):
        store.put(name, b"x")
    beside.put("z", b"x")

    assert names(store) == {"a", "b/c", "b/d/e", "b2/f"}
    assert names(store, "b") == {"b/c", "b/d/e"}
    assert names(store, "none") == set()


def _sibling(location: Location) -> Location:
    """A folder whose name begins with the name of this one."""
    if not location.path:
        return Location(scheme=location.scheme, root=f"{location.root}2")
    return Location(
        scheme=location.scheme,
        root=location.root,
        path=f"{location.path}2",
        access=location.access,
    )


def test_a_file_is_created_once(store: Store) -> None:
    assert store.create("lease/1.json", b"mine")
    assert not store.create("lease/1.json", b"yours")
    assert store.get("lease/1.json") == b"mine"


def test_of_several_who_create_a_file_one_succeeds(store: Store) -> None:
    start = threading.Barrier(4)

    def create(number: int) -> bool:
        start.wait()
        return store.create("lease", b"%d" % number)

    with ThreadPoolExecutor(4) as threads:
        won = list(threads.map(create, range(4)))
    assert sum(won) == 1
    assert store.get("lease") == b"%d" % won.index(True)


@pytest.mark.parametrize(("offset", "nbytes"), [(0, 10), (1, 99_999), (4097, 200_001), (7, 0)])
def test_ranges_are_read_into_the_callers_memory(store: Store, offset: int, nbytes: int) -> None:
    data = content(300_000)
    store.put("base", data)
    reader = store.open(store.look("base"))
    buffer = memoryview(bytearray(nbytes + 8192))

    view = reader.read_into(buffer, offset, nbytes)

    assert bytes(view) == data[offset : offset + nbytes]
    assert view.obj is buffer.obj
    assert bytes(reader.read(offset, nbytes)) == data[offset : offset + nbytes]
    reader.close()


def test_threads_share_a_reader(store: Store) -> None:
    data = content(300_000)
    store.put("base", data)
    reader = store.open(store.look("base"))
    with ThreadPoolExecutor(4) as threads:
        parts = list(
            threads.map(lambda at: bytes(reader.read(at, 50_000)), range(0, 300_000, 50_000))
        )
    assert b"".join(parts) == data
    reader.close()


def test_a_range_beyond_the_end_is_refused(store: Store) -> None:
    store.put("base", b"12345678")
    reader = store.open(store.look("base"))
    with pytest.raises(StorageError, match="base"):
        reader.read(4, 5)
    reader.close()


def test_a_file_that_was_replaced_is_not_opened(store: Store) -> None:
    store.put("base", b"old bytes")
    pinned = store.look("base")
    store.put("base", b"new bytes")
    with pytest.raises(StorageError, match=r"base: the file changed while it was being merged"):
        store.open(pinned)


@pytest.mark.parametrize("then", [b"new bytes", b"short", b"longer than before", None])
def test_a_file_that_is_replaced_while_it_is_read_is_named(
    store: Store, then: bytes | None
) -> None:
    store.put("base", b"old bytes")
    reader = store.open(store.look("base"))
    if then is None:
        store.delete("base")
    else:
        store.put("base", then)
    with pytest.raises(StorageError, match=r"base: (the file changed|there is no such)"):
        reader.read(0, 9)
    reader.close()


def test_a_part_is_no_file_until_it_is_published(store: Store) -> None:
    data = content(200_000)
    part = written(store, "model.safetensors", data)
    with pytest.raises(AbsentError):
        store.look("model.safetensors")
    assert not {name for name in names(store) if not name.startswith(PARTS)}

    for _ in range(2):  # the second time as after a lost answer
        store.publish(part, "model.safetensors", len(data))
        assert read(store, "model.safetensors") == data
        assert {name for name in names(store) if not name.startswith(PARTS)} == {
            "model.safetensors"
        }


def test_a_publish_is_seen_whole_or_not_at_all(store: Store) -> None:
    data, seen, done = content(200_000), set[int](), threading.Event()
    part = written(store, "model", data)

    def poll() -> None:
        while not done.is_set():
            try:
                seen.add(len(store.get("model")))
            except AbsentError:
                seen.add(-1)

    with ThreadPoolExecutor(1) as threads:
        polling = threads.submit(poll)
        while -1 not in seen and not polling.done():
            pass
        store.publish(part, "model", len(data))
        while len(data) not in seen and not polling.done():
            pass
        done.set()
        polling.result()
    assert seen == {-1, len(data)}


def test_a_name_that_is_taken_stays_as_it_is(store: Store) -> None:
    first, late = content(100_000, seed=1), content(100_000, seed=2)
    accepted = written(store, "model", first, "1-a")
    twin = written(store, "model", late, "2-b")
    store.publish(accepted, "model", len(first))
    with pytest.raises(StorageError, match="model: there is a file of that name"):
        store.publish(twin, "model", len(late))
    assert store.get("model") == first


def test_a_part_of_another_size_is_not_published(store: Store) -> None:
    part = written(store, "model", content(70_000))
    with pytest.raises(StorageError, match=r"model: .*70000 of 70001 bytes"):
        store.publish(part, "model", 70_001)
    assert names(store) <= {name for name in names(store) if name.startswith(PARTS)}


def test_a_part_that_was_swept_is_not_published(store: Store) -> None:
    gone, kept = written(store, "model", content(9)), written(store, "model2", content(9))
    store.sweep("model")
    with pytest.raises(AbsentError, match="model: the part of attempt 1-a is gone"):
        store.publish(gone, "model", 9)
    store.publish(kept, "model2", 9)
    assert names(store) == {"model2"}


def test_a_sweep_ends_all_parts_and_leaves_files_alone(store: Store) -> None:
    store.publish(written(store, "done", content(9)), "done", 9)
    part = written(store, "model", content(70_000))
    unfinished = store.start("other", 200_000, "1-a")
    unfinished.write(memoryview(content(70_000)), 0)
    store.sweep()
    unfinished.discard()
    with pytest.raises(AbsentError):
        store.publish(part, "model", 70_000)
    assert names(store) == {"done"}
    store.sweep()


def test_a_discarded_part_leaves_nothing(store: Store) -> None:
    part = store.start("model", 200_000, "1-a")
    part.write(memoryview(content(150_000)), 0)
    part.discard()
    part.discard()
    assert set(store.list(PARTS)) == set()
    assert names(store) == set()


@pytest.mark.parametrize("missing", [0, 100_000, 199_999])
def test_a_part_that_lacks_bytes_is_not_finished(store: Store, missing: int) -> None:
    data = memoryview(content(200_000))
    part = store.start("model", len(data), "1-a")
    part.write(data[:missing], 0)
    part.write_small(bytes(data[missing + 1 :]), missing + 1)
    with pytest.raises(StorageError, match=r"model.* of 200000 bytes"):
        part.finish()
    part.discard()


@pytest.mark.parametrize("size", [0, 1, 65_536, 65_537])
def test_files_of_any_size_are_published(store: Store, size: int) -> None:
    store.publish(written(store, "model", content(size)), "model", size)
    assert store.look("model").size == size
    assert read(store, "model") == content(size)


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_file_may_be_written_in_any_pieces_by_any_threads(
    make_store: Callable[[], Store], data: st.DataObject
) -> None:
    size = data.draw(st.integers(1, 400_000))
    cuts = sorted(data.draw(st.sets(st.integers(1, max(1, size - 1)), max_size=12)) - {size})
    pieces = _shuffled(list(itertools.pairwise([0, *cuts, size])), data.draw(st.randoms()))
    threads, store, bytes_ = data.draw(st.integers(1, 4)), make_store(), content(size)
    part = store.start("model", size, "1-a")

    _write_in_turn(part, bytes_, pieces, threads)

    store.publish(part.finish(), "model", size)
    assert store.get("model") == bytes_


def _shuffled(pieces: list[tuple[int, int]], random: Any) -> list[tuple[int, int]]:
    """In any order in which none is further than the window ahead of what is not yet written."""
    left, order = list(pieces), []
    while left:
        near = [piece for piece in left if piece[0] - left[0][0] <= WINDOW]
        order.append(random.choice(near))
        left.remove(order[-1])
    return order


def _write_in_turn(
    part: PartWriter, data: bytes, pieces: list[tuple[int, int]], threads: int
) -> None:
    """Each thread takes the next piece, into memory that it uses again."""
    turn, view = iter(pieces), memoryview(data)
    lock = threading.Lock()

    def work() -> None:
        own = bytearray(len(data))
        while True:
            with lock:
                start, end = next(turn, (-1, -1))
            if start < 0:
                return
            own[: end - start] = view[start:end]
            part.write(memoryview(own)[: end - start], start)
            own[: end - start] = bytes(end - start)

    with ThreadPoolExecutor(threads) as pool:
        for running in [pool.submit(work) for _ in range(threads)]:
            running.result()


def test_a_store_may_be_sent_to_another_process(store: Store) -> None:
    store.put("a", b"x")
    assert pickle.loads(pickle.dumps(store)).get("a") == b"x"


def test_the_protocols_are_kept(store: Store) -> None:
    """Mypy compares them as well: these assignments are what it checks."""
    store.put("a", b"x")
    reader: Reader = store.open(store.look("a"))
    part: PartWriter = store.start("b", 1, "1-a")
    reader.close()
    part.discard()
    assert store.location == type(store)(location=store.location).location

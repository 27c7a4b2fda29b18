"""What every store keeps of its promises about files and ranges of them."""

from __future__ import annotations

import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from backends import content, names

from merge_core.errors import AbsentError, StorageError
from merge_core.stores.location import Location
from merge_core.stores.store import FileIdentity, PartWriter, Reader, Store


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
        store.open(ghost).read(0, 1)
    store.delete("a.json")
    assert names(store) == set()


def test_a_deleted_file_is_absent(store: Store) -> None:
    store.put("a", b"x")
    store.delete("a")
    with pytest.raises(AbsentError):
        store.look("a")


def test_the_clock_is_the_one_that_stamps_files_and_is_read_without_a_write(store: Store) -> None:
    store.put("a", b"x")
    (listed,) = store.list()
    assert abs(store.clock() - listed.modified) < 30  # a busy machine; the clocks are this one's
    assert names(store) == {"a"}


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


def test_a_file_that_was_replaced_is_not_read(store: Store) -> None:
    store.put("base", b"old bytes")
    pinned = store.look("base")
    store.put("base", b"new bytes")
    with pytest.raises(StorageError, match=r"base: the file changed while it was being merged"):
        store.open(pinned).read(0, 1)


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

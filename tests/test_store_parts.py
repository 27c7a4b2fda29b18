"""What every store keeps of its promises about parts: unseen, published whole, swept."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from backends import WINDOW, content, names, read, written
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from merge_core.errors import AbsentError, StorageError
from merge_core.stores.store import PARTS, PartWriter, Store


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

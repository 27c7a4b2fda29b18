"""What is read of a store before it is asked for."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from merge_core.errors import StorageError
from merge_core.read_ahead import AHEAD, BEHIND, MOST, ReadAhead, Room
from merge_core.read_blocks import BLOCK_BYTES, GAP_BYTES, Range, blocks_of

MIB = 1 << 20


def content(first: int, behind: int) -> bytes:
    """Of every file: each KiB begins with its number."""
    kibs = range(first >> 10, -(-behind >> 10))
    some = b"".join(n.to_bytes(4, "big").ljust(1024, b"-") for n in kibs)
    return some[first - (kibs.start << 10) :][: behind - first]


class Recorded:
    """A file that notes what is read of it."""

    def __init__(self, before: Callable[[int], None] = lambda _: None) -> None:
        self.asked: list[tuple[int, int]] = []
        self._before = before

    def read_into(self, buffer: memoryview, offset: int, nbytes: int) -> memoryview:
        self.asked.append((offset, nbytes))
        self._before(offset)
        view = buffer[:nbytes]
        view[:] = content(offset, offset + nbytes)
        return view

    def read(self, offset: int, nbytes: int) -> memoryview:
        return self.read_into(memoryview(bytearray(nbytes)), offset, nbytes)

    def close(self) -> None:
        """Nothing."""


@contextmanager
def ahead_of(files: Sequence[Recorded], ranges: Sequence[Range]) -> Iterator[ReadAhead]:
    with closing(ReadAhead(files, ranges, Room())) as ahead:
        yield ahead


def read(ahead: ReadAhead, file: int, first: int, behind: int) -> bytes:
    return bytes(ahead.reader(file).read(first, behind - first))


def test_what_lies_close_together_is_one_request() -> None:
    file = Recorded()
    ranges = [Range(0, n * 4096, n * 4096 + 1000) for n in range(100)]

    with ahead_of([file], ranges) as ahead:
        for each in ranges:
            assert read(ahead, 0, each.first, each.behind) == content(each.first, each.behind)

    assert file.asked == [(0, 99 * 4096 + 1000)]


def test_what_lies_far_apart_is_not_read_over() -> None:
    near, far = 1000 + GAP_BYTES, 3000 + 2 * GAP_BYTES

    assert list(blocks_of([Range(0, 0, 1000), Range(0, near, 2000 + near)])) == [
        Range(0, 0, 2000 + near)
    ]
    assert list(blocks_of([Range(0, 0, 1000), Range(0, far, far + 1)])) == [
        Range(0, 0, 1000),
        Range(0, far, far + 1),
    ]


def test_what_is_long_is_blocks_of_8_to_16_mib() -> None:
    sizes = [block.nbytes for block in blocks_of([Range(0, 5, 5 + 100 * MIB + 1)])]

    assert sum(sizes) == 100 * MIB + 1
    assert len(sizes) == 12
    assert all(BLOCK_BYTES <= size < 2 * BLOCK_BYTES for size in sizes)


def test_blocks_come_in_the_order_in_which_they_are_read() -> None:
    late, early, other = Range(0, 0, 10), Range(0, 64 * MIB, 65 * MIB), Range(1, 0, 10)

    assert list(blocks_of([early, other, late])) == [early, other, late]


def test_blocks_are_fetched_before_they_are_asked_for_and_no_more_than_planned() -> None:
    reached, most = threading.Semaphore(0), 4 * AHEAD
    file = Recorded(lambda _: reached.release())

    with ahead_of([file], [Range(0, 0, most * BLOCK_BYTES)]) as ahead:
        read(ahead, 0, 0, 10)
        for _ in range(1 + AHEAD):
            assert reached.acquire(timeout=30)

    assert sorted(first // BLOCK_BYTES for first, _ in file.asked) == list(range(1 + AHEAD))


def test_blocks_of_which_something_is_never_asked_for_give_way() -> None:
    most = 6 * AHEAD
    file = Recorded()

    with ahead_of([file], [Range(0, 0, most * BLOCK_BYTES)]) as ahead:
        for number in range(most):
            first = number * BLOCK_BYTES
            assert read(ahead, 0, first, first + 10) == content(first, first + 10)
        assert len(ahead._there) <= MOST + BEHIND

    assert len(file.asked) == most


def test_what_is_read_again_is_asked_for_again() -> None:
    file = Recorded()

    with ahead_of([file], [Range(0, 0, MIB)]) as ahead:
        assert read(ahead, 0, 0, MIB) == content(0, MIB)
        assert read(ahead, 0, 1024, 2048) == content(1024, 2048)

    assert file.asked == [(0, MIB), (1024, 1024)]


@pytest.mark.parametrize("size", [1000, MIB])
def test_a_failed_fetch_fails_who_wants_it_and_may_be_tried_again(size: int) -> None:
    failing = [True]

    def fail(offset: int) -> None:
        if failing[0]:
            raise StorageError(f"at {offset}", "file")

    file = Recorded(fail)
    with ahead_of([file], [Range(0, 0, size)]) as ahead:
        with pytest.raises(StorageError, match="at 0"):
            read(ahead, 0, 0, 1000)
        failing[0] = False

        assert read(ahead, 0, 0, 1000) == content(0, 1000)


@given(
    planned=st.lists(
        st.tuples(st.integers(0, 1), st.integers(0, 1 << 16), st.integers(0, 1 << 14)), max_size=12
    ),
    asked=st.lists(
        st.tuples(st.integers(0, 1), st.integers(0, 1 << 16), st.integers(0, 1 << 15)), max_size=12
    ),
)
def test_whatever_was_planned_what_is_asked_for_is_read(
    planned: list[tuple[int, int, int]], asked: list[tuple[int, int, int]]
) -> None:
    files = [Recorded(), Recorded()]
    ranges = [Range(file, first, first + count) for file, first, count in planned]

    with ahead_of(files, ranges) as ahead:
        for file, first, count in asked:
            found = read(ahead, file, first, first + count)
            assert found == content(first, first + count)
    blocks = sorted(blocks_of(ranges))
    assert all(a.file < b.file or a.behind <= b.first for a, b in pairwise(blocks))
    for each in ranges:
        held = (
            min(b.behind, each.behind) - max(b.first, each.first)
            for b in blocks
            if b.file == each.file
        )
        assert sum(max(0, nbytes) for nbytes in held) == each.nbytes


def test_small_tensors_that_are_written_last_are_not_asked_for_again() -> None:
    """As a layer's norms and biases."""
    file, weight = Recorded(), 12 * MIB
    places = [n * (weight + 4096) for n in range(40)]
    large = [Range(0, place, place + weight) for place in places]
    small = [Range(0, place + weight, place + weight + 4096) for place in places]

    with ahead_of([file], [*large, *small]) as ahead:
        for each in [*large, *small]:
            assert read(ahead, 0, each.first, each.behind) == content(each.first, each.behind)

    assert sum(nbytes for _, nbytes in file.asked) == small[-1].behind


def test_what_lies_close_together_but_is_read_apart_are_blocks_of_their_own() -> None:
    """As layers 1 and 10, which lie side by side where names are sorted."""
    one, ten, two = (Range(0, n * MIB, (n + 1) * MIB) for n in range(3))

    assert list(blocks_of([one, two, ten])) == [one, two, ten]


def test_the_next_shard_is_fetched_in_the_room_that_is_left_once_all_of_this_one_is_under_way() -> (
    None
):
    reached = threading.Semaphore(0)
    file, following = Recorded(), Recorded(lambda _: reached.release())
    whole, most = 3 * BLOCK_BYTES, 2 * MOST * BLOCK_BYTES

    room = Room()
    with closing(ReadAhead([following], [Range(0, 0, most)], room)) as then:
        with closing(ReadAhead([file], [Range(0, 0, whole)], room)) as ahead:
            ahead.then = then
            assert following.asked == []
            read(ahead, 0, 0, 10)
            for _ in range(MOST - 3):
                assert reached.acquire(timeout=30)
            assert room.held == MOST
            assert read(ahead, 0, 0, whole) == content(0, whole)
            for _ in range(3):
                assert reached.acquire(timeout=30)
            assert room.held == MOST

        assert read(then, 0, 0, most) == content(0, most)

    assert sum(nbytes for _, nbytes in following.asked) == most
    assert len(file.asked) == 3


def test_what_was_fetched_for_nobody_leaves_its_room() -> None:
    reached = threading.Semaphore(0)
    file = Recorded(lambda _: reached.release())

    room = Room()
    for number in range(3):
        with closing(ReadAhead([file], [Range(0, 0, 5 * BLOCK_BYTES)], room)) as ahead:
            read(ahead, 0, 0, 10)
            assert reached.acquire(timeout=30)
            assert room.held == 5, number
        assert room.held == 0

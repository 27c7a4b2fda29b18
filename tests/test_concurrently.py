"""Requests at the same time: so many and no more, and nobody is held up by those that hang."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import threading

import pytest

from merge_core.stores import blocks
from merge_core.stores.blocks import fill_in_blocks
from merge_core.stores.concurrently import concurrently


@pytest.mark.parametrize(("items", "at_most", "together"), [(9, 3, 3), (2, 3, 2), (0, 3, 0)])
def test_each_is_done_once_and_so_many_at_a_time(items: int, at_most: int, together: int) -> None:
    meet, lock = threading.Barrier(max(1, together)), threading.Lock()
    running, most, done = set[int](), list[int](), list[int]()

    def work(item: int) -> None:
        with lock:
            running.add(item)
            most.append(len(running))
        if item < together:
            meet.wait(10)
        with lock:
            running.remove(item)
            done.append(item)

    concurrently(work, range(items), at_most)

    assert sorted(done) == list(range(items))
    assert max(most, default=0) == together


def test_after_a_failure_nothing_is_begun() -> None:
    begun = list[int]()

    def work(item: int) -> None:
        begun.append(item)
        if item == 3:
            raise IndexError("no such block")

    with pytest.raises(IndexError, match="no such block"):
        concurrently(work, range(100), 1)
    assert begun == [0, 1, 2, 3]


def test_a_failure_is_told_once_what_is_under_way_has_ended() -> None:
    done, begun, failed = list[int](), threading.Event(), threading.Event()

    def work(item: int) -> None:
        if item == 0:
            assert begun.wait(10)
            failed.set()
            raise IndexError("no such block")
        begun.set()
        assert failed.wait(10)
        done.append(item)

    with pytest.raises(IndexError, match="no such block"):
        concurrently(work, range(2), 2)
    assert done == [1]


def test_blocks_of_a_read_are_filled_each_from_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 10)
    content, target = bytes(range(200)), bytearray(95)

    def fill(view: memoryview, offset: int) -> None:
        assert len(view) <= 10
        view[:] = content[offset : offset + len(view)]

    fill_in_blocks(memoryview(target), 7, fill)
    assert target == content[7:102]


def test_python_ends_while_a_read_of_blocks_hangs() -> None:
    code = """
        import threading
        from merge_core.stores import blocks
        blocks.BLOCK_BYTES = 10
        hangs = threading.Event()

        def fill(view, offset):
            hangs.set()
            threading.Event().wait()

        read = lambda: blocks.fill_in_blocks(memoryview(bytearray(95)), 0, fill)
        threading.Thread(target=read, daemon=True).start()
        hangs.wait()
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, timeout=60)

"""Waiting for workers is told now and then, and ends."""

from __future__ import annotations

from cluster.patience import SAY_SECONDS, Patience


def patience(said: list[str], timeout: float = 100.0, doing: str = "") -> Patience:
    return Patience("cuda", timeout, "1 GPU", said.append, lambda: doing)


def test_what_is_awaited_is_said_every_half_minute() -> None:
    said: list[str] = []
    waiting = patience(said, doing="1 node launching")
    for second in range(1000, 1000 + int(2.5 * SAY_SECONDS)):
        waiting.look(second, up=0, pending=3)

    assert said == ["waiting for 3 x {1 GPU}; 1 node launching"] * 2


def test_a_worker_that_comes_up_starts_the_count_again() -> None:
    said: list[str] = []
    waiting = patience(said)
    for second in range(90):
        waiting.look(second, up=0, pending=1)
    waiting.look(90, up=1, pending=0)
    for second in range(91, 91 + 29):
        waiting.look(second, up=0, pending=2)

    assert said == ["waiting for 1 x {1 GPU}"] * 2


def test_without_anything_pending_nothing_is_awaited() -> None:
    said: list[str] = []
    waiting = patience(said, timeout=0)
    for second in range(500):
        waiting.look(second, up=0, pending=0)

    assert said == []


def test_the_end_of_patience_names_what_did_not_come() -> None:
    waiting = patience([], doing="1 node failed to launch, the last: no capacity")
    waiting.look(0, up=0, pending=2)
    waiting.look(99, up=0, pending=2)

    end = waiting.look(100, up=0, pending=2)

    assert end is not None
    assert end.kind == "cuda"
    assert "no worker came up in 100 s" in str(end.error)
    assert "waiting for 2 x {1 GPU}; 1 node failed to launch, the last: no capacity" in str(
        end.error
    )
    assert "--start-timeout" in str(end.error)

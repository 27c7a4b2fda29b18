"""Of a Ray that does not come to its end, the next session of the process is told."""

from __future__ import annotations

import threading

import pytest

from cluster import session
from merge_core.errors import RaymeldError


def test_a_session_waits_for_the_one_before_and_begins_none_beside_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ended = threading.Event()
    leaving = threading.Thread(target=ended.wait)
    leaving.start()
    monkeypatch.setattr(session, "_leaving", [leaving])
    monkeypatch.setattr(session, "LEFT_SECONDS", 0.01)

    with (
        pytest.raises(RaymeldError, match="does not come to its end"),
        session.session("local", use_gpus=False),
    ):
        pytest.fail("there are two")

    ended.set()
    monkeypatch.setattr(session, "LEFT_SECONDS", 60.0)
    session._wait_for_leaving()
    assert session._leaving == []

"""What the stores on obstore have of their own: writing in one order, out of a window."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from fault_proxy import Fault, FaultProxy
from network_faults import say

from merge_core.errors import StorageError
from merge_core.stores import object_parts
from merge_core.stores.gcs import GcsStore
from merge_core.stores.location import Location
from merge_core.stores.objects import ObjectsStore

NAMES = itertools.count()
DATA = bytes(range(256)) * 1024
"""256 KiB."""


class Watched(dict[int, bytes]):
    """Knows the most bytes that it held."""

    most = 0

    def __setitem__(self, offset: int, data: bytes) -> None:
        super().__setitem__(offset, data)
        self.most = max(self.most, sum(map(len, self.values())))


def test_what_waits_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    window, piece, lanes = 50_000, 7_000, 4
    monkeypatch.setattr(object_parts, "WINDOW_BYTES", window)
    store = ObjectsStore(Location(scheme="memory", root=f"objects{next(NAMES)}"))
    part = store.start("model", len(DATA), "1-a")
    part._ahead = watched = Watched()
    with ThreadPoolExecutor(lanes) as threads:
        writes = [
            threads.submit(part.write, memoryview(DATA)[start : start + piece], start)
            for start in range(0, len(DATA), piece)
        ]
        for write in writes:
            write.result()
    store.publish(part.finish(), "model", len(DATA))
    assert store.get("model") == DATA
    assert watched.most <= window + lanes * piece


def test_an_upload_that_fails_ends_its_writers(
    gs_store: GcsStore, gs_proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    gs_proxy.faults(Fault(say(403), method="PUT", path="partNumber", times=None))
    part = gs_store.start("model", 1 << 40, "1-a")

    def write_on() -> None:
        for start in range(0, 1 << 40, len(DATA)):
            part.write(memoryview(DATA), start)

    with pytest.raises(StorageError, match="parts/model/1-a: access is denied"):
        write_on()
    with pytest.raises(StorageError, match="access is denied"):
        part.finish()
    part.discard()


def test_an_upload_that_ends_in_any_way_ends_its_writers(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("of a kind that nobody expects")

    store = ObjectsStore(Location(scheme="memory", root=f"objects{next(NAMES)}"))
    monkeypatch.setattr("obstore.put", broken)
    part = store.start("model", 1 << 40, "1-a")
    with pytest.raises(RuntimeError, match="nobody expects"):
        part.write(memoryview(DATA), object_parts.WINDOW_BYTES + 1)  # which would wait
    with pytest.raises(RuntimeError, match="nobody expects"):
        part.finish()
    part.discard()

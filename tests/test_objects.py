"""What the stores on obstore have of their own: writing in one order, out of a window."""

from __future__ import annotations

import contextlib
import datetime as dt
import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import obstore.store
import pytest
from s3_server import KEY, SECRET

from merge_core.errors import StorageError
from merge_core.stores import object_parts, objects
from merge_core.stores.location import Location
from merge_core.stores.objects import ObjectsStore

NAMES = itertools.count()
DATA = bytes(range(256)) * 1024
"""256 KiB."""


def s3_by_obstore(bucket: str, endpoint: str | None, **options: Any) -> obstore.store.S3Store:
    return obstore.store.S3Store(
        bucket,
        endpoint=endpoint,
        access_key_id=KEY,
        secret_access_key=SECRET,
        region="us-east-1",
        copy_if_not_exists="multipart",
        client_options={"allow_http": True},
        **options,
    )


@contextlib.contextmanager
def as_gcs(backend: obstore.store.S3Store) -> Iterator[ObjectsStore]:
    """The store for GCS, over another server: none that can be had here speaks GCS well enough."""
    location = Location(scheme="gs", root=f"bucket{next(NAMES)}", path="out")
    objects._backends["gs", location.root] = backend
    yield ObjectsStore(location)
    del objects._backends["gs", location.root]


def test_objects_lie_in_a_bucket_as_they_do_in_memory(s3: Location) -> None:
    with as_gcs(s3_by_obstore(s3.root, s3.access.endpoint_url)) as store:
        assert store.create("lease/1", b"mine")
        assert not store.create("lease/1", b"yours")
        parts = [store.start("model", len(DATA), f"{number}-a") for number in range(3)]
        for part in parts:
            part.write(memoryview(DATA)[1000:], 1000)
            part.write_small(DATA[:1000], 0)
        first, twin, late = (part.finish() for part in parts)
        assert [found.name for found in store.list()] == ["lease/1"]

        store.publish(first, "model", len(DATA))
        with pytest.raises(StorageError, match="there is a file of that name"):
            store.publish(twin, "model", len(DATA))
        store.sweep("model")
        with pytest.raises(StorageError, match="attempt 2-a is gone"):
            store.publish(late, "model", len(DATA))

        assert {found.name for found in store.list()} == {"lease/1", "model"}
        reader = store.open(store.look("model"))
        assert reader.read(5, 100_000) == DATA[5:100_005]
        store.put("model", DATA)
        with pytest.raises(StorageError, match="model: the file changed"):
            reader.read(5, 100_000)


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


def test_an_upload_that_fails_ends_its_writers() -> None:
    once = {"max_retries": 0, "retry_timeout": dt.timedelta(seconds=1)}
    with as_gcs(s3_by_obstore("bucket", "http://127.0.0.1:9", retry_config=once)) as store:
        part = store.start("model", 1 << 40, "1-a")

        def write_on() -> None:
            for start in range(0, 1 << 40, len(DATA)):
                part.write(memoryview(DATA), start)

        with pytest.raises(StorageError, match=r"parts/model/1-a: the store failed: Generic S3"):
            write_on()
        with pytest.raises(StorageError, match="the store failed"):
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

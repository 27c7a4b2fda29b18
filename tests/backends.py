"""The stores that keep the promises of ``merge_core.stores.store``, and what their tests do to all.

A backend joins by a line in ``BACKENDS``.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest

from merge_core.stores import object_parts, s3_parts
from merge_core.stores.gcs import GcsStore
from merge_core.stores.location import Location
from merge_core.stores.objects import ObjectsStore
from merge_core.stores.s3 import S3Store
from merge_core.stores.store import Store

FOLDERS = itertools.count()

DATA = bytes(range(256)) * 1024
"""256 KiB."""

BACKENDS: dict[str, Callable[[pytest.FixtureRequest], Callable[[], Store]]] = {
    "memory": lambda _: lambda: ObjectsStore(Location(scheme="memory", root=f"m{next(FOLDERS)}")),
    "s3": lambda request: lambda: S3Store(request.getfixturevalue("s3") / f"f{next(FOLDERS)}"),
    "gs": lambda request: lambda: GcsStore(request.getfixturevalue("gs") / f"f{next(FOLDERS)}"),
}

WINDOW = 256 << 10
"""Bytes within which the writes of a test come in any order."""


def make_parts_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have what is written be several parts, however small."""
    monkeypatch.setattr(s3_parts, "PART_BYTES", 64 << 10)
    monkeypatch.setattr(object_parts, "CHUNK_BYTES", 64 << 10)
    monkeypatch.setattr(object_parts, "WINDOW_BYTES", WINDOW)


def content(size: int, seed: int = 0) -> bytes:
    """Bytes of which no two pages are the same."""
    return b"".join(b"%08x" % (seed * 1_000_003 + at) for at in range(-(-size // 8)))[:size]


def names(store: Store, below: str = "") -> set[str]:
    return {found.name for found in store.list(below)}


def written(store: Store, name: str, data: bytes = DATA, attempt: str = "1-a") -> str:
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

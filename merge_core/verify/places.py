"""What verification reads beside tensor data, wherever it lies.

Of a disk it reads by its own means, not by those that wrote there; of a store through the store,
which is only the way there.
"""

from __future__ import annotations

import os
from contextlib import closing

import numpy as np
import numpy.typing as npt

from merge_core.stores.location import Location
from merge_core.stores.opening import is_there, open_file, open_store, read_file, sent_unread

HEAD_BYTES = 100_000
"""Of a file in a store, read at once: a second request costs more than these bytes."""

Bytes = npt.NDArray[np.uint8]


def read_bytes(file: Location) -> bytes:
    """All of a small file.

    Raises:
        OSError: it cannot be read; FileNotFoundError: it is not there.
    """
    return file.local.read_bytes() if file.is_local else read_file(file)


def exists(file: Location) -> bool:
    """Whether there is such a file."""
    return file.local.exists() if file.is_local else is_there(file)


def names_in(folder: Location) -> set[str]:
    """Names of the files in a folder, not of those in folders in there.

    Raises:
        OSError: it cannot be looked into.
    """
    if folder.is_local:
        return {path.name for path in folder.local.glob("*")}
    return {listed.name for listed in open_store(folder).list() if "/" not in listed.name}


def read_head(file: Location, head_bytes: int) -> tuple[bytes, int]:
    """The first bytes of a file, at most so many, and its size.

    Raises:
        OSError: it cannot be read.
    """
    if file.is_local:
        with open(file.local, "rb") as opened:
            return opened.read(head_bytes), os.fstat(opened.fileno()).st_size
    sent = sent_unread(file)
    if sent is not None:
        return sent.header, sent.size
    reader, size = open_file(file)
    with closing(reader):
        return bytes(reader.read(0, min(head_bytes, size))), size


def read_range(file: Location, start: int, nbytes: int) -> Bytes:
    """Some bytes of a file, in memory of their own; fewer where it ends before.

    Raises:
        OSError: they cannot be read.
    """
    if file.is_local:
        return np.fromfile(file.local, np.uint8, nbytes, offset=start)
    reader, _ = open_file(file)
    with closing(reader):
        return np.frombuffer(reader.read(start, nbytes), np.uint8)


def map_range(file: Location, start: int, nbytes: int) -> Bytes:
    """The same, mapped where that is possible. Raises as ``read_range`` does."""
    if file.is_local:
        return np.memmap(file.local, np.uint8, "r", offset=start, shape=(nbytes,))
    return read_range(file, start, nbytes)

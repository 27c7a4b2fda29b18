"""Carrying a side file over, from one store to another."""

from __future__ import annotations

import hashlib
import secrets
from contextlib import closing

from merge_core.errors import replaced
from merge_core.plan import SideFile
from merge_core.stores.location import Location
from merge_core.stores.opening import fetch, open_store

BLOCK_BYTES = 8 << 20
"""Of a side file at a time: most fit, and none may cost memory however large it is."""


def carry(side: SideFile, target: Location) -> str:
    """Put a side file into the folder ``target``; returns its sha256.

    Raises:
        StorageError: it was replaced since it was pinned, or cannot be read or written.
    """
    file, source, store = side.file, open_store(side.folder), open_store(target)
    digest = hashlib.sha256()
    if file.size <= BLOCK_BYTES:
        data = source.get(file.name)
        if len(data) != file.size:
            raise replaced(side.folder / file.name)
        store.put(side.name, data)
        return hashlib.sha256(data).hexdigest()
    fetch(side.folder, file)
    with closing(source.open(file)) as reader:
        part = store.start(side.name, file.size, secrets.token_hex(8))
        try:
            for first in range(0, file.size, BLOCK_BYTES):
                data = bytes(reader.read(first, min(BLOCK_BYTES, file.size - first)))
                digest.update(data)
                part.write_small(data, first)
            finished = part.finish()
        except BaseException:
            part.discard()
            raise
    store.publish(finished, side.name, file.size)
    return digest.hexdigest()

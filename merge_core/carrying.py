"""Carrying a side file over, from one store to another."""

from __future__ import annotations

import hashlib
import secrets
from contextlib import closing

from merge_core.errors import replaced
from merge_core.stores.location import Location
from merge_core.stores.opening import open_store
from merge_core.stores.store import FileIdentity

BLOCK_BYTES = 8 << 20
"""Of a side file at a time: most fit, and none may cost memory however large it is."""


def carry(source: Location, file: FileIdentity, target: Location) -> str:
    """Put a file of the folder ``source`` into the folder ``target``; returns its sha256.

    Raises:
        StorageError: it was replaced since it was pinned, or cannot be read or written.
    """
    store, digest = open_store(target), hashlib.sha256()
    if file.size <= BLOCK_BYTES:
        data = open_store(source).get(file.name)
        if len(data) != file.size:
            raise replaced(source / file.name)
        store.put(file.name, data)
        return hashlib.sha256(data).hexdigest()
    with closing(open_store(source).open(file)) as reader:
        part = store.start(file.name, file.size, secrets.token_hex(8))
        try:
            for first in range(0, file.size, BLOCK_BYTES):
                data = bytes(reader.read(first, min(BLOCK_BYTES, file.size - first)))
                digest.update(data)
                part.write_small(data, first)
            finished = part.finish()
        except BaseException:
            part.discard()
            raise
    store.publish(finished, file.name, file.size)
    return digest.hexdigest()

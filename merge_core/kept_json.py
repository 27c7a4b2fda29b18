"""A JSON file in OUT that is replaced now and then: how far a merge is, and its history."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from concurrent.futures import Future, wait
from functools import partial
from typing import Any

from merge_core.background import in_background
from merge_core.errors import StorageError
from merge_core.lease import is_held
from merge_core.stores.last_writes import write_last
from merge_core.stores.location import Location
from merge_core.stores.opening import open_store


class KeptJson:
    """Replaces one file while a run has the lease; not durable, and never an error.

    A disk is written at once, a store by a thread, so that no merge waits for its answers: what
    comes while the last content is still on its way is left out.

    Args:
        name: of the file in ``out``.
        run: of the lease under which it is written; once another merge has it, nothing is.
    """

    def __init__(self, out: Location, name: str, run: str) -> None:
        self._out, self._name, self._run = out, name, run
        self._store = open_store(out)
        self._writing: Future[None] | None = None

    def keep(self, content: Mapping[str, Any]) -> None:
        """Replace what the file holds."""
        data = json.dumps(content).encode()
        if self._out.is_local:
            self._write(data)
        elif self._writing is None or self._writing.done():
            self._writing = in_background(partial(self._write, data))

    def close(self, content: Mapping[str, Any]) -> None:
        """Replace it for the last time, see ``last_writes``."""
        write_last(self._out, partial(self._write_last, json.dumps(content).encode()))

    def _write_last(self, data: bytes) -> None:
        if self._writing is not None:
            wait([self._writing])
        self._write(data)

    def _write(self, data: bytes) -> None:
        with contextlib.suppress(StorageError):  # a full disk ends the merge where it matters
            if is_held(self._out, self._run):
                self._store.put(self._name, data, durable=False)

"""What obstore reaches as a store: the memory of this process, and Google Cloud Storage (``gcs``).

Neither can be told to finish an upload that another process began, so a part is an object of its
own, which publishing copies: GCS does that without moving data.
"""

from __future__ import annotations

import contextlib
import secrets
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import obstore
from obstore.exceptions import AlreadyExistsError
from obstore.store import MemoryStore

from merge_core.errors import AbsentError, replaced
from merge_core.stores.blocks import BlockReader
from merge_core.stores.failures import ATTEMPT, gone, incomplete, misplaced, taken
from merge_core.stores.location import Location
from merge_core.stores.object_errors import answered, reported
from merge_core.stores.object_parts import ObjectPartWriter
from merge_core.stores.store import PARTS, FileIdentity, Listed

_memories: dict[str, MemoryStore] = {}
_lock = threading.Lock()


@dataclass(frozen=True, slots=True)
class ObjectsStore:
    """See ``store.Store``. Threads may share it; it holds nothing, so it may be sent anywhere.

    What ``memory://name`` holds is there for everybody in this process, until it ends.
    """

    location: Location

    def look(self, name: str) -> FileIdentity:
        """See ``store.Store``."""
        with reported(self.location / name):
            head = obstore.head(self._backend, self._key(name))
        return FileIdentity(name=name, size=head["size"], pin=head["e_tag"] or "")

    def list(self, below: str = "") -> Iterator[Listed]:
        """See ``store.Store``."""
        for found in self._found(below):
            if not found.name.startswith(f"{PARTS}/"):
                yield found

    def get(self, name: str) -> bytes:
        """See ``store.Store``."""
        with reported(self.location / name):
            return bytes(obstore.get(self._backend, self._key(name)).bytes())

    def open(self, file: FileIdentity) -> ObjectReader:
        """See ``store.Store``."""
        if self.look(file.name) != file:
            raise replaced(self.location / file.name)
        return ObjectReader(self._backend, self.location / file.name, file)

    def put(self, name: str, data: bytes, *, durable: bool = True) -> None:  # noqa: ARG002 - always is
        """See ``store.Store``."""
        with reported(self.location / name):
            obstore.put(self._backend, self._key(name), data)

    def create(self, name: str, data: bytes) -> bool:
        """See ``store.Store``."""
        attempt = secrets.token_hex(8)
        with reported(self.location / name):
            return answered(lambda: self._created(name, data, attempt))

    def start(self, name: str, size: int, attempt: str) -> ObjectPartWriter:
        """See ``store.Store``."""
        part = _part(name, attempt)
        return ObjectPartWriter(self._backend, self.location / part, size, attempt)

    def publish(self, part: str, name: str, size: int) -> None:
        """See ``store.Store``."""
        where = self.location / name
        with reported(where):
            try:
                got = self.look(_part(name, part)).size
            except AbsentError as error:
                if self._wrote(name, part):
                    return
                raise gone(where, part) from error
            if got != size:
                raise incomplete(where, got, size)
            if not answered(lambda: self._copied(part, name)):
                raise taken(where)
        self.delete(_part(name, part))

    def sweep(self, name: str | None = None) -> None:
        """See ``store.Store``."""
        for found in list(self._found(PARTS if name is None else f"{PARTS}/{name}")):
            if name is None or found.name.rpartition("/")[0] == f"{PARTS}/{name}":
                self.delete(found.name)

    def delete(self, name: str) -> None:
        """See ``store.Store``."""
        with reported(self.location / name), contextlib.suppress(FileNotFoundError):
            answered(lambda: obstore.delete(self._backend, self._key(name)))

    def clock(self) -> float:
        """See ``store.Store``. The client library shows nobody when an answer was given."""
        return time.time()

    @property
    def _backend(self) -> Any:
        """What obstore calls a store; one a process."""
        with _lock:
            return _memories.setdefault(self.location.root, MemoryStore())

    def _key(self, name: str) -> str:
        return (self.location / name).path

    def _found(self, below: str) -> Iterator[Listed]:
        """Parts as well."""
        folder = self.location / below if below else self.location
        with reported(folder):
            for page in obstore.list(self._backend, prefix=folder.path or None):
                for found in page:
                    name = found["path"].removeprefix(self.location.path).removeprefix("/")
                    modified = found["last_modified"].timestamp()
                    yield Listed(name=name, size=found["size"], modified=modified)

    def _created(self, name: str, data: bytes, attempt: str) -> bool:
        """Make an object; False if there is another one of that name."""
        mark, key = {ATTEMPT: attempt}, self._key(name)
        try:
            obstore.put(self._backend, key, data, mode="create", attributes=mark)
        except AlreadyExistsError:  # perhaps by a try whose answer was lost
            return self._wrote(name, attempt)
        return True

    def _copied(self, part: str, name: str) -> bool:
        """Have the store copy it; False if there is another file of that name."""
        source, target = self._key(_part(name, part)), self._key(name)
        try:
            obstore.copy(self._backend, source, target, overwrite=False)
        except AlreadyExistsError:  # perhaps by a try whose answer was lost
            return self._wrote(name, part)
        return True

    def _wrote(self, name: str, attempt: str) -> bool:
        """Whether the object that is there now was written by that attempt."""
        try:
            found = obstore.get(self._backend, self._key(name), options={"head": True})
        except FileNotFoundError:
            return False
        return found.attributes.get(ATTEMPT) == attempt


class ObjectReader(BlockReader):
    """See ``store.Reader``. Every request names the ETag that was pinned."""

    def __init__(self, backend: Any, where: Location, file: FileIdentity) -> None:
        super().__init__(where, file)
        self._backend = backend

    def _fill_block(self, view: memoryview, offset: int) -> None:
        """In one request; obstore asks again for what is left where its answer breaks off."""
        end = offset + len(view)
        with reported(self._where):
            options: obstore.GetOptions = {"range": (offset, end), "if_match": self._file.pin}
            found = obstore.get(self._backend, self._where.path, options=options)
            data = memoryview(found.bytes())
        if found.meta["e_tag"] != self._file.pin:  # of a server that knows no If-Match
            raise replaced(self._where)
        if found.range != (offset, end) or len(data) != len(view):
            asked, got = f"bytes {offset}-{end - 1}", f"{found.range} with {len(data)} bytes"
            raise misplaced(self._where, asked, got)
        view[:] = data


def _part(name: str, attempt: str) -> str:
    return f"{PARTS}/{name}/{attempt}"

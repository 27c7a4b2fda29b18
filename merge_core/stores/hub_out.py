"""A model on the hub as the destination of a merge, before its commit and after it.

The hub holds weights, which nobody sees or reads until a commit has them; everything else lies in
the state, a folder elsewhere, where a small record stands for each file of weights that was sent.
"""

from __future__ import annotations

import base64
import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

from huggingface_hub import constants

from merge_core.errors import AbsentError, StorageError, replaced
from merge_core.stores.failures import gone, incomplete, taken
from merge_core.stores.hub import HubStore
from merge_core.stores.hub_errors import HubPlace
from merge_core.stores.hub_files import pin, read_tree
from merge_core.stores.hub_objects import HubObjects, Sent
from merge_core.stores.location import Location, Upload
from merge_core.stores.retries import PATIENT
from merge_core.stores.scratch import scratch_of
from merge_core.stores.store import HUB_RECORD, FileIdentity, Listed, PartWriter, Reader, Store

SENT = ".raymeld/sent"
"""In the state: what stands for files of weights, and in folders of their names for parts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SentFile:
    """What is known of a file that the hub holds, from reading it back before it was sent."""

    part: str
    """The attempt that wrote it."""
    size: int
    sha256: str
    header: bytes
    """Of safetensors, its length in front."""
    digests: Mapping[str, str]
    """Of each tensor."""

    def to_json(self) -> bytes:
        """As the state keeps it."""
        fields = dataclasses.asdict(self) | {"header": base64.b64encode(self.header).decode()}
        return json.dumps(fields, indent=1).encode()

    @classmethod
    def from_json(cls, data: bytes) -> Self:
        """What ``to_json`` wrote.

        Raises:
            ValueError, KeyError, TypeError: it is something else.
        """
        fields = json.loads(data)
        return cls(**fields | {"header": base64.b64decode(fields["header"], validate=True)})


class HubOut:
    """See ``store.Store``.

    Args:
        location: a model, or a folder of its state.
        state: the store of that folder.
    """

    def __init__(self, location: Location, state: Store) -> None:
        self.location, self._state = location, state

    def look(self, name: str) -> FileIdentity:
        """See ``store.Store``."""
        if not self._is_weights(name):
            return self._state.look(name)
        sent = self.sent(name)
        return FileIdentity(name=name, size=sent.size, pin=sent.sha256)

    def list(self, below: str = "") -> Iterator[Listed]:
        """See ``store.Store``. The size of weights would cost a read of each one's record."""
        for found in self._state.list(below):
            yield found
            name = found.name.removeprefix(f"{SENT}/").removesuffix(".json")
            if not below and "/" not in name and found.name == _record(name):
                yield dataclasses.replace(found, name=name, size=None)

    def get(self, name: str) -> bytes:
        """See ``store.Store``."""
        return self._state.get(name)

    def open(self, file: FileIdentity) -> Reader:
        """See ``store.Store``. Of weights that are not committed there is the header alone."""
        if not self._is_weights(file.name):
            return self._state.open(file)
        if self.look(file.name) != file:
            raise replaced(self.location / file.name)
        if self.committed is None:
            return _HeaderReader(self.location / file.name, self.sent(file.name).header)
        there = HubStore(dataclasses.replace(self.location, revision=self.committed, upload=None))
        return there.open(there.look(file.name))

    def put(self, name: str, data: bytes, *, durable: bool = True) -> None:
        """See ``store.Store``."""
        self._state.put(name, data, durable=durable)

    def create(self, name: str, data: bytes) -> bool:
        """See ``store.Store``."""
        return self._state.create(name, data)

    def start(
        self, name: str, size: int, attempt: str, say: Callable[[str], None] | None = None
    ) -> PartWriter:
        """See ``store.Store``. What is finished of weights is for ``part_of``.

        Args:
            say: told what is waited for, see ``Scratch``.
        """
        if not self._is_weights(name):
            return self._state.start(name, size, attempt)
        unique = f"{self.location.root.replace('/', '--')}-{name}-{attempt}"
        return scratch_of(self._upload, say).start(unique, size)

    def part_of(self, name: str, sent: SentFile) -> str:
        """The part that a file which was sent is, for ``publish``."""
        self._state.put(_record_of_part(name, sent.part), sent.to_json())
        return sent.part

    def publish(self, part: str, name: str, size: int) -> None:
        """See ``store.Store``."""
        if not self._is_weights(name):
            self._state.publish(part, name, size)
            return
        where = self.location / name
        there = self._sent(_record(name))
        if there is not None and there.part != part:
            raise taken(where)
        sent = there or self._sent(_record_of_part(name, part))
        if sent is None:
            raise gone(where, part)
        if sent.size != size:
            raise incomplete(where, sent.size, size)
        if there is None:
            self._state.put(_record(name), sent.to_json())
        self._state.delete(_record_of_part(name, part))

    def sweep(self, name: str | None = None) -> None:
        """See ``store.Store``; of this node's scratch what belongs to nobody any more."""
        if name is None or not self._is_weights(name):
            self._state.sweep(name)
        below = SENT if name is None else f"{SENT}/{name}"
        for found in list(self._state.list(below)):
            if "/" in found.name.removeprefix(f"{SENT}/"):
                self._state.delete(found.name)
        if name is None:
            scratch_of(self._upload).sweep()

    def delete(self, name: str) -> None:
        """See ``store.Store``."""
        self._state.delete(_record(name) if self._is_weights(name) else name)

    def clock(self) -> float:
        """See ``store.Store``."""
        return self._state.clock()

    def sent(self, name: str) -> SentFile:
        """What stands for a file of weights.

        Raises:
            AbsentError: it was not sent.
        """
        found = self._sent(_record(name))
        if found is None:
            what = "was not sent to the hub, as far as its state tells"
            raise AbsentError(what, str(self.location / name), "Give the merge command again")
        return found

    @property
    def record(self) -> Mapping[str, Any]:
        """What the state knows of the model; empty before a merge has begun."""
        try:
            found = json.loads(self._state.get(HUB_RECORD))
        except (AbsentError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    @property
    def committed(self) -> str | None:
        """The commit that has all of it, if there is one."""
        return self.record.get("commit")

    @property
    def target(self) -> HubPlace:
        """The model and its branch."""
        branch = self.location.revision or constants.DEFAULT_REVISION
        return HubPlace(repo=self.location.root, revision=branch)

    @cached_property
    def objects(self) -> HubObjects:
        """What the hub holds for the model."""
        return HubObjects(self.target, PATIENT)

    def holds(self, name: str) -> bool:
        """Whether the hub still holds a file that was sent."""
        sent = self.sent(name)
        asked = Sent(name=name, size=sent.size, sha256=sent.sha256)
        return not self.objects.missing([asked])

    def is_on_branch(self, sizes: Mapping[str, int]) -> bool:
        """Whether the branch has these files of weights now, as they were sent in these sizes."""
        try:
            place, _ = pin(self.target, PATIENT)
            files = read_tree(place, "", 0.0, PATIENT).files
            sent = {name: self.sent(name) for name in sizes}
        except AbsentError:
            return False
        return all(
            one.size == sizes[name] and name in files and files[name].holds(one.sha256)
            for name, one in sent.items()
        )

    @property
    def _upload(self) -> Upload:
        if self.location.upload is None:
            raise AssertionError(f"{self.location} is only read from")
        return self.location.upload

    def _is_weights(self, name: str) -> bool:
        return not self.location.path and "/" not in name and name.endswith(".safetensors")

    def _sent(self, record: str) -> SentFile | None:
        """None if there is none that can be read: what it would speak of is merged again."""
        try:
            return SentFile.from_json(self._state.get(record))
        except (AbsentError, ValueError, KeyError, TypeError):
            return None


class _HeaderReader:
    """See ``store.Reader``."""

    def __init__(self, where: Location, header: bytes) -> None:
        self._where, self._header = where, header

    def read_into(self, buffer: memoryview, offset: int, nbytes: int) -> memoryview:
        view = buffer[:nbytes]
        view[:] = self.read(offset, nbytes)
        return view

    def read(self, offset: int, nbytes: int) -> memoryview:
        if offset + nbytes > len(self._header):
            what = "is on the hub, which lets nobody read it before the commit"
            raise StorageError(what, str(self._where))
        return memoryview(self._header)[offset : offset + nbytes]

    def close(self) -> None:
        """Nothing is open."""


def _record(name: str) -> str:
    return f"{SENT}/{name}.json"


def _record_of_part(name: str, part: str) -> str:
    return f"{SENT}/{name}/{part}.json"

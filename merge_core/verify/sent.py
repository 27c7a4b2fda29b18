"""Files that go to the hub: read back before they are sent, as nobody can read them before the
commit, and after that known by the sha256 of what was read back.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import xxhash

from merge_core.stores.location import Location
from merge_core.stores.opening import open_hub_out
from merge_core.verify.digests import CELL_BYTES, cells, tensor_digest
from merge_core.verify.header import read_header
from merge_core.verify.ledger import Row
from merge_core.verify.places import read_head
from merge_core.verify.reading import new_buffer, open_reader
from merge_core.verify.report import Finding, at

if TYPE_CHECKING:  # huggingface_hub takes long to import
    from merge_core.stores.hub_out import SentFile


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadBack:
    """What a file of weights on a disk holds."""

    header: bytes
    """Its length in front."""
    size: int
    sha256: str
    digests: Mapping[str, str]
    """Of each tensor, see ``digests``."""

    def changed(self, digests: Mapping[str, str]) -> list[str]:
        """The tensors that are not what they were when they had ``digests``, new ones included."""
        names = self.digests.keys() | digests.keys()
        return sorted(name for name in names if self.digests.get(name) != digests.get(name))


def read_back(file: Location) -> ReadBack:
    """Read every byte of a file, once: the digests and the sha256 are of the same bytes.

    Raises:
        MalformedError: its header is broken.
        OSError: it cannot be read.
    """
    entries = read_header(file)
    start = min((entry.start for entry in entries), default=0)
    header, size = read_head(file, start)
    whole, digests, buffer = hashlib.sha256(header), {}, new_buffer(CELL_BYTES)
    with open_reader(file) as reader:
        for entry in entries:  # in the order of their data, without holes
            found = []
            for cell in cells(entry):
                data = reader.read(*cell, buffer).data
                whole.update(data)
                found.append(xxhash.xxh3_128_digest(data))
            digests[entry.name] = tensor_digest(found)
    return ReadBack(header=header, size=size, sha256=whole.hexdigest(), digests=digests)


def check_sent(file: Location, sent: SentFile, rows: Mapping[str, Row]) -> Iterator[Finding]:
    """Whether the hub holds what was read back, and that is what the ledger says."""
    if not open_hub_out(file.parent).holds(file.name):
        what = f"the hub does not hold it: sha256 {sent.sha256}"
        yield Finding(check="files", where=file.name, what=what)
    for tensor, row in rows.items():
        found = sent.digests.get(tensor)
        if found != row.digest:
            what = f"digest {found} when it was sent, the ledger says {row.digest}"
            yield Finding(check="digest", where=at(file.name, tensor), what=what)

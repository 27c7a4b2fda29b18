"""An object of S3 under way: a multipart upload, which nobody can take for the object.

The upload is of the final key, so that completing it moves no data. What was uploaded, S3 itself
knows (ListParts): whoever publishes it needs only the upload's id.
"""

from __future__ import annotations

import contextlib
import threading
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

from merge_core.stores.failures import ATTEMPT, incomplete
from merge_core.stores.last_writes import write_last
from merge_core.stores.location import Location
from merge_core.stores.s3_client import checksum_of, client_for, sends_checksums
from merge_core.stores.s3_errors import reported

PART_BYTES = 8 << 20
"""Of a part, where there are not too many: small, since a writer holds some two a lane."""

MOST_PARTS = 10_000
"""Of one upload, by S3's own limit: files of more than 84 GB have larger parts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Upload:
    """A multipart upload of a known key; its text is the part that ``Store.publish`` takes."""

    id: str
    attempt: str

    def __str__(self) -> str:
        return f"{self.attempt} {self.id}"

    @classmethod
    def of(cls, part: str) -> Upload:
        """What ``part`` names."""
        attempt, _, upload = part.rpartition(" ")
        return cls(id=upload, attempt=attempt)

    @classmethod
    def begin(cls, where: Location, attempt: str) -> Self:
        """A new one.

        Raises:
            botocore.exceptions.ClientError: it may not be begun there.
        """
        client = client_for(where.access)
        checked = {"ChecksumAlgorithm": "CRC32"} if sends_checksums(client) else {}
        answer = client.create_multipart_upload(
            Bucket=where.root, Key=where.path, Metadata={ATTEMPT: attempt}, **checked
        )
        return cls(id=answer["UploadId"], attempt=attempt)

    def named(self, where: Location) -> dict[str, str]:
        """Which one it is, as requests say it."""
        return {"Bucket": where.root, "Key": where.path, "UploadId": self.id}

    def abort(self, where: Location) -> None:
        """Leave nothing of it, see ``last_writes``: the next sweep finds it. Never raises."""
        write_last(where, partial(self._abort, where))

    def _abort(self, where: Location) -> None:
        with contextlib.suppress(Exception):
            client_for(where.access).abort_multipart_upload(**self.named(where))


def part_bytes(size: int, usual: int) -> int:
    """Bytes of each part but the last of a file of ``size`` bytes: ``usual`` if it is not large."""
    least = -(-size // MOST_PARTS)
    return usual if least <= usual else -(-least >> 20) << 20


class S3PartWriter:
    """See ``store.PartWriter``.

    What is written gathers in buffers of one part. The thread that fills a part's last gap uploads
    it, so a lane that is faster than the store waits for it, and there are never more buffers than
    parts that lanes are in the middle of.
    """

    def __init__(self, where: Location, size: int, attempt: str) -> None:
        self._where, self._size = where, size
        self._part_bytes = part_bytes(size, PART_BYTES)
        self._gaps: dict[int, _Filling] = {}
        self._spare: list[bytearray] = []
        self._uploaded: set[int] = set()
        self._sent = 0
        self._lock = threading.Lock()
        with reported(where):
            self._upload = Upload.begin(where, attempt)

    def write(self, data: memoryview, offset: int) -> None:
        """See ``store.PartWriter``."""
        if not 0 <= offset <= offset + len(data) <= self._size:
            raise AssertionError(f"{len(data)} bytes at {offset} of a file of {self._size}")
        while data:
            number, start = divmod(offset, self._part_bytes)
            some = data[: self._part_bytes - start]
            full = self._fill(number, start, some)
            if full is not None:
                self._send(number, full)
            data, offset = data[len(some) :], offset + len(some)

    def write_small(self, data: bytes, offset: int) -> None:
        """See ``store.PartWriter``."""
        self.write(memoryview(data), offset)

    def finish(self) -> str:
        """See ``store.PartWriter``."""
        if self._size == 0:
            self._send(0, bytearray())
        if self._sent < self._size:
            raise incomplete(self._where, self._sent, self._size)
        return str(self._upload)

    def discard(self) -> None:
        """See ``store.PartWriter``."""
        self._upload.abort(self._where)

    def _fill(self, number: int, start: int, data: memoryview) -> bytearray | None:
        """Put ``data`` into a part; the part if it is full now."""
        with self._lock:
            if number in self._uploaded:
                raise AssertionError(f"part {number} was written before")
            if number not in self._gaps:
                self._gaps[number] = self._empty(number)
            filling = self._gaps[number]
        filling.buffer[start : start + len(data)] = data
        with self._lock:
            filling.left -= len(data)
            if filling.left < 0:
                raise AssertionError(f"bytes of part {number} were written twice")
            return self._gaps.pop(number).buffer if filling.left == 0 else None

    def _empty(self, number: int) -> _Filling:
        """One of those that were uploaded already, if there is one: fresh memory is slow."""
        size = min(self._part_bytes, self._size - number * self._part_bytes)
        if size == self._part_bytes and self._spare:
            return _Filling(buffer=self._spare.pop(), left=size)
        return _Filling(buffer=bytearray(size), left=size)

    def _send(self, number: int, buffer: bytearray) -> None:
        client: Any = client_for(self._where.access)
        with reported(self._where):
            client.upload_part(
                **self._upload.named(self._where),
                PartNumber=number + 1,
                Body=buffer,
                **checksum_of(buffer, client),
            )
        with self._lock:
            self._uploaded.add(number)
            self._sent += len(buffer)
            if len(buffer) == self._part_bytes:
                self._spare.append(buffer)


@dataclass(slots=True, kw_only=True)
class _Filling:
    """A part that is being written."""

    buffer: bytearray
    left: int
    """Bytes that are still to come."""

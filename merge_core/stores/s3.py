"""S3, and what speaks its protocol, as a store."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any

from merge_core.errors import AbsentError, StorageError
from merge_core.stores.failures import ATTEMPT, gone, incomplete, taken
from merge_core.stores.location import Location
from merge_core.stores.retries import STUBBORN
from merge_core.stores.s3_client import checksum_of, client_for
from merge_core.stores.s3_copy import S3CopiedPart
from merge_core.stores.s3_errors import BROKEN, CONFLICT, GONE, TAKEN, code_of, reported
from merge_core.stores.s3_parts import S3PartWriter, Upload
from merge_core.stores.s3_reader import S3Reader
from merge_core.stores.store import FileIdentity, Listed

_proven: set[tuple[Any, str]] = set()
"""Clients and buckets that were seen to refuse what ``create`` must not do twice."""


@dataclass(frozen=True, slots=True)
class S3Store:
    """See ``store.Store``. Threads may share it; it holds nothing, so it may be sent anywhere."""

    location: Location

    def look(self, name: str) -> FileIdentity:
        """See ``store.Store``."""
        head = self._head(name)
        return FileIdentity(name=name, size=head["ContentLength"], pin=head["ETag"])

    def list(self, below: str = "") -> Iterator[Listed]:
        """See ``store.Store``."""
        folder = self.location / below if below else self.location
        with reported(folder):
            pages = self._client.get_paginator("list_objects_v2").paginate(
                Bucket=folder.root, Prefix=_prefix(folder)
            )
            for found in (one for page in pages for one in page.get("Contents", ())):
                name = found["Key"].removeprefix(_prefix(self.location))
                if not name.endswith("/") and name:  # consoles make such objects for folders
                    modified = found["LastModified"].timestamp()
                    yield Listed(name=name, size=found["Size"], modified=modified)

    def get(self, name: str) -> bytes:
        """See ``store.Store``."""
        failed = 0
        with reported(self.location / name):
            while True:
                body = self._client.get_object(**self._at(name))["Body"]
                try:
                    return bytes(body.read())
                except BROKEN as error:
                    failed += 1
                    STUBBORN.pause_after(failed, error)
                finally:
                    body.close()

    def open(self, file: FileIdentity) -> S3Reader:
        """See ``store.Store``. Every read proves that it is the file; to ask now would only cost
        a request for each file that is opened.
        """
        return S3Reader(self.location / file.name, file)

    def put(self, name: str, data: bytes, *, durable: bool = True) -> None:  # noqa: ARG002 - always is
        """See ``store.Store``."""
        with reported(self.location / name):
            self._put(name, data)

    def create(self, name: str, data: bytes) -> bool:
        """See ``store.Store``.

        Raises:
            StorageError: also where the server does not know If-None-Match.
        """
        failed, attempt = 0, secrets.token_hex(8)
        with reported(self.location / name):
            while True:
                try:
                    self._put(name, data, IfNoneMatch="*", Metadata={ATTEMPT: attempt})
                except Exception as error:
                    if code_of(error) in TAKEN:  # perhaps by a try whose answer was lost
                        return self._wrote(name, attempt)
                    if code_of(error) not in CONFLICT:
                        raise
                    failed += 1
                    STUBBORN.pause_after(failed, error)
                else:
                    self._prove_refusal(name, data, attempt)
                    return True

    def start(self, name: str, size: int, attempt: str) -> S3PartWriter:
        """See ``store.Store``."""
        return S3PartWriter(self.location / name, size, attempt)

    def copy(self, source: Location, file: FileIdentity, name: str, attempt: str) -> S3CopiedPart:
        """A part that may become ``name``: ``file`` in the folder ``source`` of the same server.

        Raises: see ``S3CopiedPart``.
        """
        return S3CopiedPart(self.location / name, source / file.name, file, attempt)

    def publish(self, part: str, name: str, size: int) -> None:
        """See ``store.Store``."""
        upload = Upload.of(part)
        with reported(self.location / name):
            try:
                self._complete(upload, name, size)
            except Exception as error:  # perhaps of a try whose answer was lost
                if self._wrote(name, upload.attempt):
                    return
                if code_of(error) in GONE:
                    raise gone(self.location / name, upload.attempt) from error
                if code_of(error) in TAKEN:
                    raise taken(self.location / name) from error
                raise

    def sweep(self, name: str | None = None) -> None:
        """See ``store.Store``; what is under way in folders below may be anybody's."""
        where = self.location if name is None else self.location / name
        prefix = _prefix(where) if name is None else where.path
        with reported(where):
            pages = self._client.get_paginator("list_multipart_uploads").paginate(
                Bucket=where.root, Prefix=prefix
            )
            for found in [one for page in pages for one in page.get("Uploads", ())]:
                below = found["Key"].removeprefix(prefix)
                if "/" not in below if name is None else not below:
                    self._abort(found["Key"], found["UploadId"])

    def delete(self, name: str) -> None:
        """See ``store.Store``."""
        with reported(self.location / name):
            self._client.delete_object(**self._at(name))

    def clock(self) -> float:
        """See ``store.Store``: every answer is dated."""
        where = {"Bucket": self.location.root, "Prefix": _prefix(self.location)}
        with reported(self.location):
            said = self._client.list_objects_v2(**where, MaxKeys=1)
        date = said["ResponseMetadata"]["HTTPHeaders"].get("date")
        return parsedate_to_datetime(date).timestamp() if date else time.time()

    @property
    def _client(self) -> Any:
        return client_for(self.location.access)

    def _at(self, name: str) -> dict[str, str]:
        where = self.location / name
        return {"Bucket": where.root, "Key": where.path}

    def _head(self, name: str) -> Any:
        with reported(self.location / name):
            return self._client.head_object(**self._at(name))

    def _put(self, name: str, data: bytes, **conditions: Any) -> None:
        checked = checksum_of(data, self._client)
        self._client.put_object(**self._at(name), Body=data, **checked, **conditions)

    def _wrote(self, name: str, attempt: str) -> bool:
        """Whether the object that is there now was written by that attempt."""
        try:
            return bool(self._head(name)["Metadata"].get(ATTEMPT) == attempt)
        except AbsentError:
            return False

    def _prove_refusal(self, name: str, data: bytes, attempt: str) -> None:
        """Have it created once more, in vain: two merges must not both think that they may.

        Done once a bucket; a server that ignores the condition only writes the same again.
        """
        if (self._client, self.location.root) in _proven:
            return
        try:
            self._put(name, data, IfNoneMatch="*", Metadata={ATTEMPT: attempt})
        except Exception as error:
            if code_of(error) not in TAKEN | CONFLICT:
                raise
            _proven.add((self._client, self.location.root))
            return
        raise StorageError(
            "the server ignores If-None-Match, so two merges would not notice each other",
            str(self.location / name),
            "Choose another --out, or a newer version of the server.",
        )

    def _complete(self, upload: Upload, name: str, size: int) -> None:
        """Make the object out of the parts that S3 holds."""
        named = upload.named(self.location / name)
        pages = self._client.get_paginator("list_parts").paginate(**named)
        parts = [part for page in pages for part in page.get("Parts", ())]
        _check_parts(parts, size, self.location / name)
        self._client.complete_multipart_upload(
            **named,
            MultipartUpload={"Parts": [_reference(part) for part in parts]},
            IfNoneMatch="*",
        )

    def _abort(self, key: str, upload: str) -> None:
        try:
            self._client.abort_multipart_upload(Bucket=self.location.root, Key=key, UploadId=upload)
        except Exception as error:
            if code_of(error) not in GONE:  # by another sweep
                raise


def _prefix(folder: Location) -> str:
    """Of the keys in it: with the slash, for ``out`` is not ``out2``."""
    return f"{folder.path}/" if folder.path else ""


def _check_parts(parts: Sequence[Mapping[str, Any]], size: int, where: Location) -> None:
    numbers, got = [part["PartNumber"] for part in parts], sum(part["Size"] for part in parts)
    if numbers != list(range(1, len(parts) + 1)) or got != size:
        raise incomplete(where, got, size)


def _reference(part: Mapping[str, Any]) -> dict[str, Any]:
    """What completing wants to hear of a part again."""
    return {key: part[key] for key in ("PartNumber", "ETag", "ChecksumCRC32") if key in part}

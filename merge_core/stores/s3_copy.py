"""An object of S3 under way that the server makes out of another one: no byte of it is sent."""

from __future__ import annotations

from typing import Any

from merge_core.errors import NotCopiedError
from merge_core.stores.concurrently import concurrently
from merge_core.stores.location import Location
from merge_core.stores.s3_client import client_for
from merge_core.stores.s3_errors import code_of, reported, status_of
from merge_core.stores.s3_parts import Upload, part_bytes
from merge_core.stores.s3_retries import NO_ANSWER, passes
from merge_core.stores.store import FileIdentity

COPY_BYTES = 64 << 20
"""Of a part that S3 copies within itself, where there are not too many. Amazon's copies some 100 MB
a second; a small server may say nothing until a part is there, and has ``STALL_SECONDS`` for it."""

COPIES = 2
"""Of them at the same time, by each worker: 5 MB a second is fast enough for one of them."""

_REFUSED = frozenset(
    ("403", "AccessDenied", "405", "MethodNotAllowed", "501", "NotImplemented", "InvalidRequest")
)
"""Codes of a server, or of rights, that do without copies: what may be read can still be sent."""


class S3CopiedPart:
    """See ``store.PartWriter``. The whole part is there from the beginning, in a multipart upload
    as any other, so that publishing it is no different; what is written has been copied already.

    Raises:
        NotCopiedError: this server does not copy, or fails to.
        StorageError: the file was replaced since it was pinned.
    """

    def __init__(self, where: Location, origin: Location, file: FileIdentity, attempt: str) -> None:
        self._where, self._origin, self._file = where, origin, file
        self._part_bytes = part_bytes(file.size, COPY_BYTES)
        with reported(where):
            self._upload = Upload.begin(where, attempt)
        try:
            concurrently(self._copy, range(0, file.size, self._part_bytes), COPIES)
        except BaseException:
            self.discard()
            raise

    def write(self, data: memoryview, offset: int) -> None:
        """See ``store.PartWriter``."""

    def write_small(self, data: bytes, offset: int) -> None:
        """See ``store.PartWriter``."""

    def finish(self) -> str:
        """See ``store.PartWriter``."""
        return str(self._upload)

    def discard(self) -> None:
        """See ``store.PartWriter``."""
        self._upload.abort(self._where)

    def _copy(self, start: int) -> None:
        end = min(start + self._part_bytes, self._file.size) - 1
        with reported(self._origin):
            answer = self._answer(start // self._part_bytes + 1, f"bytes={start}-{end}")
        if not answer.get("CopyPartResult", {}).get("ETag"):  # it took an upload of nothing
            raise _not_copied(self._where, "no answer to a copy")

    def _answer(self, number: int, wanted: str) -> Any:
        try:
            return client_for(self._where.access).upload_part_copy(
                **self._upload.named(self._where),
                PartNumber=number,
                CopySource={"Bucket": self._origin.root, "Key": self._origin.path},
                CopySourceIfMatch=self._file.pin,
                CopySourceRange=wanted,
            )
        except Exception as error:
            if why := _refusal(error):
                raise _not_copied(self._where, why) from error
            raise


def _refusal(error: Exception) -> str:
    """Why the server does not copy; empty if it would, but not this file."""
    if isinstance(error, NO_ANSWER):
        return "no answer"
    code = code_of(error)
    return code if code in _REFUSED or passes(status_of(error), code) else ""


def _not_copied(where: Location, why: str) -> NotCopiedError:
    return NotCopiedError(f"the server copies nothing within itself ({why})", str(where))

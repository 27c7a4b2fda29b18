"""One object of S3, read in ranges into the caller's memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from merge_core.errors import replaced
from merge_core.stores.blocks import BlockReader
from merge_core.stores.failures import misplaced
from merge_core.stores.retries import STUBBORN
from merge_core.stores.s3_client import client_for
from merge_core.stores.s3_errors import BROKEN, TAKEN, code_of, reported

_STEP_BYTES = 1 << 20
"""urllib3 reads into memory of its own and copies. With so much at a time that takes no more of a
core than reading into ours would, 0.5 s a GB; with 64 KiB it takes 0.8 s."""


class S3Reader(BlockReader):
    """See ``store.Reader``. Every request names the ETag that was pinned, and every answer must."""

    def _fill_block(self, view: memoryview, offset: int) -> None:
        """In one request, or in several where answers break off: each asks for what is left."""
        got = failed = 0
        while got < len(view):
            with reported(self._where), self._answer(offset + got, len(view) - got) as body:
                try:
                    while got < len(view):
                        got += body.readinto(view[got : got + _STEP_BYTES])
                except BROKEN as error:
                    failed += 1
                    STUBBORN.pause_after(failed, error)

    @contextlib.contextmanager
    def _answer(self, offset: int, nbytes: int) -> Iterator[Any]:
        """The body of exactly that range."""
        try:
            answer = client_for(self._where.access).get_object(
                Bucket=self._where.root,
                Key=self._where.path,
                Range=f"bytes={offset}-{offset + nbytes - 1}",
                IfMatch=self._file.pin,
            )
        except Exception as error:
            if code_of(error) in TAKEN | {"416", "InvalidRange"}:
                raise replaced(self._where) from error
            raise
        with contextlib.closing(answer["Body"]) as body:
            self._check(answer, offset, nbytes)
            yield body

    def _check(self, answer: Any, offset: int, nbytes: int) -> None:
        if answer.get("ETag") != self._file.pin:  # of a server that knows no If-Match
            raise replaced(self._where)
        status = answer["ResponseMetadata"]["HTTPStatusCode"]
        expected = f"bytes {offset}-{offset + nbytes - 1}/{self._file.size}"
        got, length = answer.get("ContentRange"), answer.get("ContentLength")
        if status != 206 or got != expected or length != nbytes:
            said = f"{status} with {got or 'no range'} and {length} bytes"
            raise misplaced(self._where, expected, said)

"""Multipart uploads of Google Cloud Storage that nobody will finish, found and aborted.

Whoever dies while it uploads a part leaves one: no list of objects shows it, it is paid for, and
it stays until somebody aborts it. obstore has no words for that, so these requests are our own.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import quote
from xml.etree import ElementTree as ET

import requests
from google.auth.exceptions import GoogleAuthError, TransportError

from merge_core.errors import StorageError
from merge_core.stores.gcs_client import STALL_TIME, base_url, session
from merge_core.stores.location import Location
from merge_core.stores.retries import STUBBORN

_PASSING = frozenset((408, 429, 500, 502, 503, 504))
"""Statuses after which Google asks for another try."""

_GONE = 404
"""Also an upload that another sweep has aborted."""


def abort_uploads(folder: Location, is_ours: Callable[[str], bool]) -> None:
    """Abort the uploads of objects in a folder and in those below it, as far as they are ours.

    Args:
        is_ours: of the key of such an object, whether its upload is to end.

    Raises:
        StorageError: uploads may not be listed or aborted there, or GCS fails.
        google.auth.exceptions.GoogleAuthError: there are no credentials.
    """
    url = f"{base_url()}/{quote(folder.root, safe='')}"
    with session(folder.access) as asking:
        try:
            for key, upload in list(_found(asking, url, folder)):
                if is_ours(key):
                    at = f"{url}/{quote(key, safe='')}"
                    _asked(asking, "DELETE", at, {"uploadId": upload}, accepted=_GONE)
        except (requests.RequestException, GoogleAuthError) as error:
            raise _failed(folder, error) from error


def _found(asking: requests.Session, url: str, folder: Location) -> Iterator[tuple[str, str]]:
    """Keys and ids, page by page."""
    query = {"uploads": "", "prefix": f"{folder.path}/" if folder.path else ""}
    while True:
        page = ET.fromstring(_asked(asking, "GET", url, query).content)  # noqa: S314 - GCS
        for upload in page.iterfind("{*}Upload"):
            yield upload.findtext("{*}Key", ""), upload.findtext("{*}UploadId", "")
        if page.findtext("{*}IsTruncated") != "true":
            return
        query["key-marker"] = page.findtext("{*}NextKeyMarker", "")
        query["upload-id-marker"] = page.findtext("{*}NextUploadIdMarker", "")


def _asked(
    asking: requests.Session, method: str, url: str, query: dict[str, str], accepted: int = 0
) -> requests.Response:
    """The answer, if it is none of an error, or of the one that is ``accepted``."""
    for failed in itertools.count(1):
        try:
            answer = asking.request(
                method, url, params=query, timeout=STALL_TIME.total_seconds(), allow_redirects=False
            )
            if answer.status_code in _PASSING:
                answer.raise_for_status()
        except (requests.RequestException, TransportError) as error:
            STUBBORN.pause_after(failed, error)
        else:
            if answer.status_code != accepted:
                answer.raise_for_status()
            return answer
    raise AssertionError("unreachable: the last attempt returns or raises")


def _failed(folder: Location, error: Exception) -> StorageError:
    """Without the address that was asked: the folder says it."""
    answer: Any = getattr(error, "response", None)
    said = type(error).__name__ if answer is None else f"GCS answers {answer.status_code}"
    return StorageError(
        f"uploads that were left behind cannot be aborted: {said}",
        str(folder),
        "Check that this account may list and abort multipart uploads there "
        "(roles/storage.objectUser has it).",
    )

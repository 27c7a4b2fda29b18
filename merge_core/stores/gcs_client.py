"""How Google Cloud Storage is reached: its address, and who one is to it.

One chain of credentials for every request, application default credentials as google-auth finds
them: a key file, a user's login, workload identity federation, impersonation, the service account
of a machine or pod. Tokens stay in this process.
"""

from __future__ import annotations

import datetime as dt
import functools
import logging
import os
import threading
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import google.auth
import requests
from google.auth.credentials import TokenState, with_scopes_if_required
from google.auth.exceptions import DefaultCredentialsError
from google.auth.transport.requests import Request
from obstore.store import GCSStore
from requests.auth import AuthBase

from merge_core.errors import refuse
from merge_core.stores.location import Access

if TYPE_CHECKING:
    from obstore.store import ClientConfig, GCSCredential

SCOPE = "https://www.googleapis.com/auth/devstorage.read_write"

STALL_TIME = dt.timedelta(seconds=60)
"""Without a byte of an answer before it is asked for again; also the time that a chunk has to be
sent, which for 8 MiB is 0.14 MB/s."""

REQUEST_TIME = dt.timedelta(seconds=180)
"""Of one request with its body: a block of 16 MB in it is 0.09 MB/s."""

RETRY_TIME = dt.timedelta(seconds=270)
"""After which a request is not tried again: longer than one that stalls, shorter than the five
minutes that obstore allows, for it tries again with the token that it had."""

FIRST_PAUSE = dt.timedelta(milliseconds=100)
"""Then twice as long each time."""

REFRESH_BEFORE = dt.timedelta(seconds=225)
"""The end of a token. The service of a machine hands out a new one no earlier."""


class Login:
    """The process's credentials, as obstore asks for them. Threads may share it.

    Raises:
        google.auth.exceptions.GoogleAuthError: there are none, or they are broken.
    """

    def __init__(self) -> None:
        self._request, self._lock = Request(), threading.Lock()
        # With scopes it would ask Google for the name of a project, which a bucket does without.
        found, _ = google.auth.default(request=self._request)
        self._credentials: Any = with_scopes_if_required(found, [SCOPE])  # type: ignore[no-untyped-call]

    def __call__(self) -> GCSCredential:
        """A token, and when to ask for another."""
        with self._lock:
            if self._credentials.token_state is not TokenState.FRESH:
                self._credentials.refresh(self._request)
            expiry = self._credentials.expiry  # in UTC, which it does not say
            again = expiry.replace(tzinfo=dt.UTC) - REFRESH_BEFORE if expiry else None
            return {"token": self._credentials.token, "expires_at": again}


@functools.cache
def login() -> Login:
    """The one of this process; raises as ``Login`` does."""
    _keep_warnings_out_of_logs()
    return Login()


def _keep_warnings_out_of_logs() -> None:
    """One is that no project is known, which a bucket does without; at DEBUG are requests."""
    logger = logging.getLogger("google.auth")
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.ERROR)


def base_url() -> str:
    """Of the XML API: Google's, or what obstore and what is made of it know as ``GOOGLE_BASE_URL``.

    Raises:
        InputError: it holds credentials, or is no address; or only the variable of Google's own
            clients names one, whose API is another.
    """
    url, emulator = (os.environ.get(name) for name in ("GOOGLE_BASE_URL", "STORAGE_EMULATOR_HOST"))
    if not url and emulator:
        remedy = "Name a server that answers the XML API in GOOGLE_BASE_URL, or unset it"
        raise refuse("names a server of the JSON API", "STORAGE_EMULATOR_HOST", remedy)
    url = url or "https://storage.googleapis.com"
    parts = urlsplit(url)
    if "@" in parts.netloc:
        host = parts.netloc.rpartition("@")[2]
        raise refuse("GOOGLE_BASE_URL holds credentials", host, "Leave them out")
    if parts.scheme not in ("http", "https"):
        remedy = "Write it with http:// or https:// in front"
        raise refuse("is no address of a server", f"GOOGLE_BASE_URL={url}", remedy)
    return url.rstrip("/")


def bucket(name: str, access: Access) -> GCSStore:
    """Obstore's store of one bucket.

    Raises: see ``login`` and ``base_url``.
    """
    url = base_url()
    options: ClientConfig = {
        "timeout": REQUEST_TIME,
        "read_timeout": STALL_TIME,
        "allow_http": url.startswith("http:"),
    }
    return GCSStore(
        name,
        config={"base_url": url, "skip_signature": access.anonymous},
        client_options=options,
        retry_config={"retry_timeout": RETRY_TIME, "backoff": {"init_backoff": FIRST_PAUSE}},
        credential_provider=_nobody if access.anonymous else login(),
    )


def _nobody() -> GCSCredential:
    """Asked for by requests that write, which obstore signs in any case."""
    raise DefaultCredentialsError("nothing is written by --anonymous")  # type: ignore[no-untyped-call]


def session(access: Access) -> requests.Session:
    """For the requests that obstore has no words for; raises as ``login`` does.

    Not google-auth's own, which asks other services of Google's about the account as well.
    """
    asking = requests.Session()
    if not access.anonymous:
        asking.auth = _Bearer(login())
    return asking


class _Bearer(AuthBase):
    """Signs a request."""

    def __init__(self, who: Login) -> None:
        self._who = who

    def __call__(self, r: requests.PreparedRequest) -> requests.PreparedRequest:
        r.headers["Authorization"] = f"Bearer {self._who()['token']}"
        return r

"""Google Cloud Storage as a store."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from google.auth.exceptions import DefaultCredentialsError, GoogleAuthError

from merge_core.errors import StorageError
from merge_core.stores.gcs_client import bucket
from merge_core.stores.gcs_uploads import abort_uploads
from merge_core.stores.location import Access, Location
from merge_core.stores.objects import ObjectsStore
from merge_core.stores.store import PARTS

_buckets: dict[tuple[str, Access], Any] = {}
_proven: set[str] = set()
"""Buckets that were seen to refuse what ``create`` must not do twice."""
_lock = threading.Lock()


@dataclass(frozen=True, slots=True)
class GcsStore(ObjectsStore):
    """See ``store.Store``."""

    def create(self, name: str, data: bytes) -> bool:
        """See ``store.Store``.

        Raises:
            StorageError: also where the server does not know x-goog-if-generation-match.
        """
        created = ObjectsStore.create(self, name, data)
        if created and self.location.root not in _proven:
            self._prove_refusal(name, data)
        return created

    def sweep(self, name: str | None = None) -> None:
        """See ``store.Store``: uploads first, each may still become a part."""
        folder = self.location / (PARTS if name is None else f"{PARTS}/{name}")
        with logged_in(folder):
            abort_uploads(folder, lambda key: name is None or key.rpartition("/")[0] == folder.path)
        ObjectsStore.sweep(self, name)

    def _prove_refusal(self, name: str, data: bytes) -> None:
        """Have it created once more, in vain: two merges must not both think that they may.

        Done once a bucket; a server that ignores the condition only writes the same again.
        """
        if ObjectsStore.create(self, name, data):
            raise StorageError(
                "the server ignores x-goog-if-generation-match, so two merges would not notice "
                "each other",
                str(self.location / name),
                "Choose another --out, or another server (GOOGLE_BASE_URL).",
            )
        _proven.add(self.location.root)

    @property
    def _backend(self) -> Any:
        """One a process, for its connections."""
        key = self.location.root, self.location.access
        with _lock, logged_in(self.location):
            if key not in _buckets:
                _buckets[key] = bucket(*key)
            return _buckets[key]


@contextlib.contextmanager
def logged_in(where: Location) -> Iterator[None]:
    """Turn what google-auth raises inside into a StorageError about ``where``."""
    try:
        yield
    except DefaultCredentialsError as error:
        raise StorageError(
            "no credentials of Google's were found, or they cannot be read",
            str(where),
            "Log in (gcloud auth application-default login), set GOOGLE_APPLICATION_CREDENTIALS, "
            "give the machine a service account, or read with --anonymous.",
        ) from error
    except GoogleAuthError as error:
        what = f"Google gives no token for these credentials: {type(error).__name__}"
        raise StorageError(what, str(where), "Log in again, or check the key file.") from error

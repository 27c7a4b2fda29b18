"""A server that answers the XML API of Google Cloud Storage, and keeps everything in memory.

What it is: the part of the API that obstore's client and raymeld use, with statuses, headers and
XML as Google documents them (cloud.google.com/storage/docs/xml-api): objects with generations and
ETags, preconditions, ranges, copies, lists in pages, multipart uploads; and Google's token
endpoint, which gives a token to who signs with the key of the account. Every request is looked at
under one lock, since GCS is consistent.

What it is not: Google's. Whatever the documentation does not say (how it answers to a second
completion of an upload, how it limits writes to an object) is a guess here: the stricter one.
"""

from __future__ import annotations

import datetime as dt
import itertools
import json
import secrets
import threading
from collections.abc import Mapping
from http.server import ThreadingHTTPServer
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

import google.auth.jwt
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from gcs_answers import Handler, Stored, Upload

GRANT = "urn:ietf:params:oauth:grant-type:jwt-bearer"
EXCHANGE = "urn:ietf:params:oauth:grant-type:token-exchange"
SCOPE = "https://www.googleapis.com/auth/devstorage.read_write"
POD = "what-a-pod-gets-from-another-issuer"
AUDIENCE = "https://oauth2.googleapis.com/token"
"""Whatever the address is."""
ACCOUNT = "merger@project.iam.gserviceaccount.com"


class Gcs:
    """The server, and what it holds.

    Args:
        key_file: where to write the key of the one account that may do everything here.
    """

    def __init__(self, key_file: Path) -> None:
        self.buckets: dict[str, dict[str, Stored]] = {}
        self.public: set[str] = set()
        """Buckets that anybody may read."""
        self.uploads: dict[str, Upload] = {}
        self.tokens: set[str] = set()
        """That it gave and has not forgotten."""
        self.refuses_keys = False
        self.ignores_conditions = False
        self.lifetime = 3600
        """Of the next token, in seconds."""
        self.page = 1000
        """Entries of a list at a time."""
        self.least_part = 1
        """Bytes of each part of an upload but the last; 5 MiB with Google."""
        self.lock = threading.Lock()
        self._generations = itertools.count(1_700_000_000_000_000)
        self._key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        handler = type("Handler", (Handler,), {"gcs": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()
        self.key_file = self._write_key(key_file)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def environment(self) -> dict[str, str]:
        """Has clients come here, with credentials."""
        return {
            "GOOGLE_APPLICATION_CREDENTIALS": str(self.key_file),
            "GOOGLE_BASE_URL": self.address,
            "NO_GCE_CHECK": "true",
        }

    def _write_key(self, path: Path) -> Path:
        private = self._key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        account = {
            "type": "service_account",
            "client_email": ACCOUNT,
            "private_key_id": "1",
            "private_key": private.decode(),
            "token_uri": f"{self.address}/token",
        }
        path.write_text(json.dumps(account))
        return path

    def begin(self, bucket: str, key: str, meta: Mapping[str, str] = MappingProxyType({})) -> str:
        """A multipart upload."""
        number = secrets.token_urlsafe(12)
        self.uploads[number] = Upload(bucket=bucket, key=key, meta=dict(meta))
        return number

    def uploads_of(self, bucket: str) -> dict[str, Upload]:
        """Those under way: other tests leave some in buckets of their own."""
        return {number: one for number, one in self.uploads.items() if one.bucket == bucket}

    def give_token(self, form: dict[str, str]) -> dict[str, Any]:
        """What the token endpoint answers: to a signature, or to what another issuer gave a pod."""
        if form["grant_type"] == EXCHANGE:
            assert (form["subject_token"], form["scope"]) == (POD, SCOPE)
        else:
            self._check_signature(form)
        token = f"ya29.that-nobody-may-see-{secrets.token_hex(8)}"
        self.tokens.add(token)
        given = {"access_token": token, "expires_in": self.lifetime, "token_type": "Bearer"}
        return given | {"issued_token_type": "urn:ietf:params:oauth:token-type:access_token"}

    def _check_signature(self, form: dict[str, str]) -> None:
        public = self._key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        claims = google.auth.jwt.decode(form["assertion"], certs={"1": public}, audience=AUDIENCE)
        assert (form["grant_type"], claims["iss"], claims["scope"]) == (GRANT, ACCOUNT, SCOPE)

    def store(self, bucket: str, key: str, data: bytes, meta: dict[str, str], etag: str) -> Stored:
        stored = Stored(
            data=data,
            etag=etag,
            generation=next(self._generations),
            meta=meta,
            modified=dt.datetime.now(dt.UTC).timestamp(),
        )
        self.buckets[bucket][key] = stored
        return stored

"""A Hugging Face hub on this machine, with as much of one as the real huggingface_hub asks for.

Repositories with commits, branches and tags; private and gated ones, and tokens; big files at
signed addresses, which expire; uploads through LFS, or Xet into a folder, and commits.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.parse import parse_qs, unquote, urlsplit

from hub_repos import Content, RefusedError, Repo, sha256
from hub_routes import ROUTES


class Hub:
    """The server, and what it holds.

    Args:
        cas: a folder that Xet stores into; None: the hub has no Xet.
    """

    def __init__(self, cas: Path | None = None) -> None:
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        """What was uploaded as LFS, by sha256."""
        self.tokens: dict[str, str] = {}
        """Names of accounts."""
        self.readers: set[str] = set()
        """Tokens that may only read."""
        self.cas = cas
        self.page = 1000
        """Entries of a list at a time."""
        self.lock = threading.Lock()
        self._signatures: set[str] = set()
        self._numbers = itertools.count()
        handler = type("Handler", (Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def repo(self, name: str, files: Mapping[str, Content], **how: Any) -> Repo:
        """A new one, with one commit."""
        self.repos[name] = Repo(**how)
        self.repos[name].commit(files)
        return self.repos[name]

    def sign(self) -> str:
        signature = f"signature-{next(self._numbers)}"
        self._signatures.add(signature)
        return signature

    def expire(self) -> None:
        """No address that was given so far serves any more."""
        self._signatures.clear()

    def is_signed(self, signature: str) -> bool:
        return signature in self._signatures

    def big(self, oid: str) -> bytes:
        """What has that sha256, in some commit."""
        commits = [files for repo in self.repos.values() for files in repo.commits.values()]
        contents = [data for files in commits for data in files.values() if isinstance(data, bytes)]
        return next(data for data in contents if sha256(data) == oid)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    hub: Hub

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):  # the client has gone
            super().handle()

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def answer(self) -> None:
        parts = urlsplit(self.path)
        self.query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        self.data = self._body()
        try:
            self._route(parts.path)
        except RefusedError as refused:
            said = {"X-Error-Code": refused.code, "X-Error-Message": refused.message}
            headers = {name: value for name, value in said.items() if value}
            self.send(refused.status, json.dumps({"error": refused.message}).encode(), **headers)

    def _route(self, path: str) -> None:
        for pattern, route in ROUTES:
            if match := re.fullmatch(pattern, path):
                route(self, *(part and unquote(part) for part in match.groups()))
                return
        raise RefusedError(404, "", f"no route {path}")

    do_GET = do_HEAD = do_POST = do_PUT = answer  # noqa: N815

    def send(self, status: int, body: bytes | memoryview, **headers: str) -> None:
        self.send_response(status)
        headers = {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def say(self, content: Any, **headers: str) -> None:
        self.send(200, json.dumps(content).encode(), **headers)

    def send_file(self, data: bytes, **headers: str) -> None:
        headers |= {"Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked is None:
            self.send(200, data, **headers)
            return
        first = int(asked[1])
        last = min(int(asked[2] or len(data)), len(data) - 1)
        if first > last:
            self.send(416, b"", **{"Content-Range": f"bytes */{len(data)}"})
            return
        headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
        self.send(206, memoryview(data)[first : last + 1], **headers)

    @property
    def token(self) -> str:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.hub.tokens:
            raise RefusedError(401, "", "Invalid credentials in Authorization header")
        return token

    def repo(self, name: str) -> Repo:
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and not self.token):
            # The hub does not tell the two apart, and answers strangers with 401.
            raise RefusedError(404 if self.token else 401, "RepoNotFound", "Repository not found")
        return repo

    def commit_of(self, name: str, revision: str) -> tuple[str, dict[str, Content]]:
        repo = self.repo(name)
        sha = repo.at(revision)
        if sha is None:
            raise RefusedError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha, repo.commits[sha]

    def may_write(self, name: str) -> Repo:
        repo = self.repo(name)
        self.needs_token(to_write=True)
        return repo

    def needs_token(self, *, to_write: bool) -> None:
        if not self.token:
            raise RefusedError(401, "", "This needs a token")
        if to_write and self.token in self.hub.readers:
            raise RefusedError(403, "", "you must use a write token to upload to a repository")

    def _body(self) -> bytes:
        length = self.headers.get("Content-Length")
        if length is not None or "Transfer-Encoding" not in self.headers:
            return self.rfile.read(int(length or 0))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

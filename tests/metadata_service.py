"""A metadata service to be asked over real HTTP: AWS's, with tokens, or GCP's."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

AWS_TOKEN = "/latest/api/token"
AWS_ACTION = "/latest/meta-data/spot/instance-action"
GCP_PREEMPTED = "/computeMetadata/v1/instance/preempted"


@dataclass
class Service:
    """What the service holds; a test changes it while it is asked."""

    cloud: str
    url: str = ""
    notice: str | None = None
    """AWS: the document. GCP: TRUE or FALSE."""
    tokens: list[str] = field(default_factory=list)
    """Those handed out; only the last one is good."""
    refuse_tokens: bool = False
    faults: int = 0
    """How many more questions are answered with an error."""
    asked: list[str] = field(default_factory=list)

    def expire(self) -> None:
        self.tokens.append("nobody has this one")

    def answer(self, method: str, path: str, headers: Any) -> tuple[int, str]:
        self.asked.append(f"{method} {path}")
        if self.faults:
            self.faults -= 1
            return 503, "later"
        if self.cloud == "AWS":
            return self._aws(method, path, headers)
        asked_well = headers.get("Metadata-Flavor") == "Google"
        if self.cloud == "GCP" and (method, path) == ("GET", GCP_PREEMPTED) and asked_well:
            return 200, self.notice or "FALSE"
        return 404, "not here"

    def _aws(self, method: str, path: str, headers: Any) -> tuple[int, str]:
        if (method, path) == ("PUT", AWS_TOKEN):
            if self.refuse_tokens or not headers.get("X-aws-ec2-metadata-token-ttl-seconds"):
                return 403, ""
            self.tokens.append(f"token {len(self.tokens)}")
            return 200, self.tokens[-1]
        if headers.get("X-aws-ec2-metadata-token") not in self.tokens[-1:]:
            return 401, ""
        if (method, path) == ("GET", AWS_ACTION) and self.notice:
            return 200, self.notice
        return 404, ""


@contextlib.contextmanager
def serving(cloud: str, **holds: Any) -> Iterator[Service]:
    """A service on a port of its own, until the end of the block."""
    service = Service(cloud, **holds)

    class Handler(BaseHTTPRequestHandler):
        def _reply(self) -> None:
            status, body = service.answer(self.command, self.path, self.headers)
            self.send_response(status)
            if cloud == "GCP":
                self.send_header("Metadata-Flavor", "Google")
            self.send_header("Content-Length", str(len(body.encode())))
            self.end_headers()
            self.wfile.write(body.encode())

        do_GET = do_PUT = _reply  # noqa: N815 - the names that the base class calls

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        service.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield service
        finally:
            server.shutdown()
            thread.join()

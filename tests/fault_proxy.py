"""An HTTP proxy in front of one server: it counts what passes, and makes faults where a test says.

    proxy = FaultProxy(server.address)
    proxy.faults(Fault(drop_within(1000), method="GET", path=r"/bucket/.*[.]safetensors", skip=2))

What can go wrong is in ``network_faults``.
Requests and answers pass untouched, Host included, so signatures hold. Nothing is random: a fault
meets the requests that match it in the order in which they come.
"""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import re
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self
from urllib.parse import urlsplit

CHUNK = 256 << 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What the server answered, or what it is made into."""

    status: int
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes = b""
    reason: str = ""

    def having(self, name: str, value: str | None) -> Answer:
        """With that header instead of its own; None: without it."""
        kept = tuple(pair for pair in self.headers if pair[0].lower() != name.lower())
        return dataclasses.replace(self, headers=kept if value is None else (*kept, (name, value)))

    def holding(self, body: bytes) -> Answer:
        """With that body, and the length that it has."""
        sized = self.having("Content-Length", str(len(body)))
        return dataclasses.replace(sized.having("Transfer-Encoding", None), body=body)


How = Callable[["Exchange"], None]
"""What is done with a request instead of passing it on."""


@dataclass(frozen=True, slots=True)
class Fault:
    """What goes wrong with some of the requests that match."""

    how: How
    _: dataclasses.KW_ONLY
    method: str = ""
    """Empty: any."""
    path: str = ""
    """A pattern that is searched for in path and query, as they were sent."""
    skip: int = 0
    """So many that match pass before."""
    times: int | None = 1
    """So many go wrong then; None: all."""


@dataclass(slots=True, kw_only=True)
class Seen:
    """A request that came; the bytes are those of bodies, and grow while they pass."""

    method: str
    target: str
    """Path and query."""
    headers: dict[str, str]
    """By names in small letters."""
    status: int = 0
    received: int = 0
    """From the client."""
    sent: int = 0
    """To the client."""
    faulty: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Tally:
    """Requests of one kind together."""

    requests: int
    received: int
    sent: int


@dataclass(slots=True)
class _Scheduled:
    fault: Fault
    met: int = 0


@dataclass(slots=True)
class _State:
    """What the threads of a proxy share."""

    server: tuple[str, int]
    lock: threading.Lock = field(default_factory=threading.Lock)
    closed: threading.Event = field(default_factory=threading.Event)
    open: set[socket.socket] = field(default_factory=set)
    scheduled: list[_Scheduled] = field(default_factory=list)
    seen: list[Seen] = field(default_factory=list)

    def met(self, seen: Seen) -> How | None:
        """Note a request; what happens to it."""
        with self.lock:
            self.seen.append(seen)
            for one in self.scheduled:
                fault = one.fault
                if fault.method not in ("", seen.method) or not re.search(fault.path, seen.target):
                    continue
                one.met += 1
                end = None if fault.times is None else fault.skip + fault.times
                if one.met > fault.skip and (end is None or one.met <= end):
                    seen.faulty = True
                    return fault.how
        return None


class FaultProxy:
    """Stands before the server at ``address`` (http://host:port) until it is closed."""

    def __init__(self, address: str, *faults: Fault) -> None:
        parts = urlsplit(address)
        assert parts.hostname is not None
        assert parts.port is not None
        self._state = _State((parts.hostname, parts.port))
        handler = type("Handler", (Exchange,), {"state": self._state})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.port = self._server.server_port
        self.address = f"http://127.0.0.1:{self.port}"
        self.faults(*faults)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def faults(self, *faults: Fault) -> None:
        """From now on these, counted from here, instead of those before."""
        with self._state.lock:
            self._state.scheduled = [_Scheduled(fault) for fault in faults]

    def seen(self, method: str = "", path: str = "") -> list[Seen]:
        """The requests that came, in their order; ``path`` is a pattern, as that of a fault."""
        with self._state.lock:
            return [
                one
                for one in self._state.seen
                if method in ("", one.method) and re.search(path, one.target)
            ]

    def tally(self, method: str = "", path: str = "") -> Tally:
        """Those requests together."""
        found = self.seen(method, path)
        received, sent = sum(one.received for one in found), sum(one.sent for one in found)
        return Tally(requests=len(found), received=received, sent=sent)

    def forget(self) -> None:
        """Count from here."""
        with self._state.lock:
            self._state.seen.clear()

    def close(self) -> None:
        """End it, and every connection, those that stall too."""
        self._server.shutdown()
        self._thread.join()
        self._state.closed.set()
        for connection in list(self._state.open):
            _hang_up(connection)
        self._server.server_close()


class Exchange(BaseHTTPRequestHandler):
    """The requests of one client's connection, each passed on in a connection of its own."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    state: _State
    seen: Seen

    def setup(self) -> None:
        super().setup()
        self.state.open.add(self.connection)

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):  # between two requests
            super().handle()

    def finish(self) -> None:
        self.state.open.discard(self.connection)
        with contextlib.suppress(OSError):
            super().finish()

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def exchange(self) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.seen = Seen(method=self.command, target=self.path, headers=headers)
        how = self.state.met(self.seen) or pass_on
        try:
            how(self)
        except (OSError, http.client.HTTPException):  # either side has gone: so does the other
            self.hang_up()

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = do_PATCH = exchange  # noqa: N815

    @contextlib.contextmanager
    def asked(self, *, without: str = "") -> Iterator[http.client.HTTPResponse]:
        """The server's answer to the request, without that header; its body is still to come."""
        server = http.client.HTTPConnection(*self.state.server)
        try:
            server.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() != without:
                    server.putheader(name, value)
            server.endheaders()
            chunked = "chunked" in self.headers.get("Transfer-Encoding", "").lower()
            for data in self._request_body():
                server.send(b"%x\r\n%b\r\n" % (len(data), data) if chunked else data)
            if chunked:
                server.send(b"0\r\n\r\n")
            yield server.getresponse()
        finally:
            server.close()

    def answered(self, *, without: str = "") -> Answer:
        """The server's whole answer."""
        with self.asked(without=without) as response:
            body, headers = response.read(), tuple(response.getheaders())
            status, reason = response.status, response.reason
        return Answer(status=status, reason=reason, headers=headers, body=body)

    def half_asked(self) -> None:
        """Have the server hear of the request and get half of its body, and no more."""
        with contextlib.closing(http.client.HTTPConnection(*self.state.server)) as server:
            server.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                server.putheader(name, value)
            server.endheaders()
            server.send(self._received(int(self.headers["Content-Length"]) // 2))

    def unread(self) -> None:
        """Take the request's body from the connection, so that the next request is found."""
        for _ in self._request_body():
            pass

    def send_head(self, answer: Answer) -> None:
        self.seen.status = answer.status
        lines = [f"HTTP/1.1 {answer.status} {answer.reason}"]
        lines += [f"{name}: {value}" for name, value in answer.headers]
        if ("connection", "close") in {(n.lower(), v.lower()) for n, v in answer.headers}:
            self.close_connection = True
        self.wfile.write("\r\n".join([*lines, "", ""]).encode("latin-1"))

    def send_body(self, data: bytes | memoryview) -> None:
        self.seen.sent += len(data)
        self.wfile.write(data)

    def send(self, answer: Answer) -> None:
        self.send_head(answer)
        if self.command != "HEAD":
            self.send_body(answer.body)

    def wait_for_client(self) -> None:
        """Until it hangs up, or the proxy ends."""
        while self.connection.recv(CHUNK):
            pass
        self.hang_up()

    def pause(self, seconds: float) -> None:
        self.state.closed.wait(seconds)

    def hang_up(self) -> None:
        self.close_connection = True
        _hang_up(self.connection)

    def _request_body(self) -> Iterator[bytes]:
        if "chunked" in self.headers.get("Transfer-Encoding", "").lower():
            sizes = iter(lambda: int(self.rfile.readline().partition(b";")[0], 16), 0)
            for size in sizes:
                yield self._received(size)
                self.rfile.readline()
            self.rfile.readline()
        left = int(self.headers.get("Content-Length", 0))
        while left:
            yield (data := self._received(min(left, CHUNK)))
            left -= len(data)

    def _received(self, size: int) -> bytes:
        data = self.rfile.read(size)
        if len(data) < size:
            raise ConnectionError
        self.seen.received += size
        return data


def _hang_up(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


def pass_on(exchange: Exchange) -> None:
    """No fault: what comes is sent on as it comes."""
    with exchange.asked() as response:
        head = Answer(
            status=response.status, reason=response.reason, headers=tuple(response.getheaders())
        )
        chunked, has_length = response.chunked, response.length is not None
        exchange.send_head(head)
        buffer = memoryview(bytearray(CHUNK))
        while size := response.readinto(buffer):
            if chunked:
                exchange.wfile.write(b"%x\r\n" % size)
            exchange.send_body(buffer[:size])
            if chunked:
                exchange.wfile.write(b"\r\n")
        if chunked:
            exchange.wfile.write(b"0\r\n\r\n")
        elif not has_length:
            exchange.hang_up()

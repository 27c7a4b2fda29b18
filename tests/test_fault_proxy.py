"""The proxy itself: what passes is untouched, and each fault is what its name says."""

from __future__ import annotations

import http.client
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from fault_proxy import Exchange, Fault, FaultProxy, How
from head import until
from network_faults import (
    client,
    drop,
    drop_within,
    flip,
    heard,
    ignore_range,
    kill,
    lengthen,
    lose_answer,
    misplace,
    say,
    shorten,
    stall,
    trickle,
    unheard,
    unrange,
)

BODY = bytes(range(256)) * 4


class Echo(BaseHTTPRequestHandler):
    """Serves BODY by ranges, and keeps what it is sent."""

    protocol_version = "HTTP/1.1"
    kept: list[tuple[str, bytes, list[tuple[str, str]]]]

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        start, status, data = 0, 200, BODY
        if asked := self.headers.get("Range"):
            start, end = (int(n) for n in asked.removeprefix("bytes=").split("-"))
            status, data = 206, BODY[start : end + 1]
        self.send_response(status)
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{start + len(data) - 1}/{len(BODY)}")
        if self.path == "/chunked":
            self.send_header("Transfer-Encoding", "chunked")
            data = b"%x\r\n%b\r\n0\r\n\r\n" % (len(data), data)
        else:
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    do_HEAD = do_GET  # noqa: N815

    def do_PUT(self) -> None:
        data = self.rfile.read(int(self.headers["Content-Length"]))
        self.kept.append((self.path, data, list(self.headers.items())))
        self.send_response(201)
        self.send_header("Content-Length", "0")
        self.end_headers()


@pytest.fixture(scope="module")
def server() -> Iterator[ThreadingHTTPServer]:
    kind = type("Kept", (Echo,), {"kept": []})
    running = ThreadingHTTPServer(("127.0.0.1", 0), kind)
    thread = threading.Thread(target=running.serve_forever, args=(0.01,))
    thread.start()
    yield running
    running.shutdown()
    thread.join()
    running.server_close()


@pytest.fixture
def proxy(server: ThreadingHTTPServer) -> Iterator[FaultProxy]:
    with FaultProxy(f"http://127.0.0.1:{server.server_port}") as running:
        yield running


def ask(
    proxy: FaultProxy, method: str = "GET", path: str = "/a", body: bytes | None = None, **more: Any
) -> tuple[int, dict[str, str], bytes]:
    client = http.client.HTTPConnection("127.0.0.1", proxy.port, timeout=more.pop("timeout", 30))
    try:
        client.request(method, path, body=body, headers=more.get("headers", {}))
        answer = client.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read()
    finally:
        client.close()


def ranged(proxy: FaultProxy, **more: Any) -> tuple[int, dict[str, str], bytes]:
    return ask(proxy, headers={"Range": "bytes=10-109"}, **more)


@pytest.mark.parametrize("path", ["/a", "/chunked"])
def test_what_passes_is_untouched_and_counted(proxy: FaultProxy, path: str) -> None:
    assert ask(proxy, path=path)[::2] == (200, BODY)
    assert ask(proxy, "HEAD")[::2] == (200, b"")
    assert ranged(proxy)[::2] == (206, BODY[10:110])
    tally = proxy.tally("GET")
    assert (tally.requests, tally.sent, tally.received) == (2, len(BODY) + 100, 0)
    assert [one.headers.get("range") for one in proxy.seen("GET")] == [None, "bytes=10-109"]


def test_a_request_arrives_with_every_header_as_it_was_sent(
    proxy: FaultProxy, server: ThreadingHTTPServer
) -> None:
    headers = {"Authorization": "signed", "x-amz-Date": "1", "Host": "bucket.example:81"}
    assert ask(proxy, "PUT", "/b//c?x=%2F&y", BODY, headers=headers)[0] == 201
    kept: Any = server.RequestHandlerClass
    path, data, came = kept.kept.pop()
    assert (path, data) == ("/b//c?x=%2F&y", BODY)
    assert headers.items() <= dict(came).items()
    assert sorted(name for name, _ in came) == sorted(
        [*headers, "Accept-Encoding", "Content-Length"]
    )
    assert proxy.tally("PUT").received == len(BODY)


def test_faults_meet_the_requests_that_match_in_their_order(proxy: FaultProxy) -> None:
    proxy.faults(
        Fault(say(503, Retry_After="0"), method="GET", path="^/a$", skip=1, times=2),
        Fault(say(403), path="/b", times=None),
    )
    assert [ask(proxy)[0] for _ in range(4)] == [200, 503, 503, 200]
    assert [ask(proxy, path="/b")[0] for _ in range(3)] == [403] * 3
    assert ask(proxy, "HEAD")[0] == 200
    assert [one.faulty for one in proxy.seen("GET", "/a")] == [False, True, True, False]


@pytest.mark.parametrize("how", [drop, lose_answer, drop_within(7)])
def test_connections_are_cut(proxy: FaultProxy, how: How) -> None:
    proxy.faults(Fault(how))
    with pytest.raises((http.client.HTTPException, ConnectionError)):
        ranged(proxy)
    assert ranged(proxy)[2] == BODY[10:110]


@pytest.mark.parametrize("how", [stall(), stall(7)])
def test_nothing_comes_any_more(proxy: FaultProxy, how: How) -> None:
    proxy.faults(Fault(how))
    with pytest.raises(TimeoutError):
        ranged(proxy, timeout=0.1)


def test_an_answer_is_lost_after_the_work_was_done(
    proxy: FaultProxy, server: ThreadingHTTPServer
) -> None:
    proxy.faults(Fault(lose_answer, method="PUT"))
    with pytest.raises((http.client.HTTPException, ConnectionError)):
        ask(proxy, "PUT", "/done", b"data")
    kept: Any = server.RequestHandlerClass
    assert kept.kept.pop()[:2] == ("/done", b"data")


@pytest.mark.parametrize(
    ("at", "arrived"), [(unheard, []), (Exchange.half_asked, [BODY[:512]]), (heard, [BODY])]
)
def test_who_asks_is_killed_in_the_middle_of_it(
    server: ThreadingHTTPServer, proxy: FaultProxy, at: Any, arrived: list[bytes]
) -> None:
    kept: Any = server.RequestHandlerClass
    kept.kept.clear()
    proxy.faults(Fault(kill(client, at)))
    ask_it = f"""
import http.client
connection = http.client.HTTPConnection("127.0.0.1", {proxy.port})
connection.request("PUT", "/x", bytes(range(256)) * 4)
connection.getresponse()
"""
    ended = subprocess.run([sys.executable, "-c", ask_it])
    assert ended.returncode == -signal.SIGKILL
    until(lambda: len(kept.kept) == len(arrived))
    assert [data for _, data, _ in kept.kept] == arrived


RIGHT = "bytes 10-109/1024"
WRONG = "bytes 0-99/1024"


@pytest.mark.parametrize(
    ("how", "status", "content_range", "body"),
    [
        (say(503, b"busy"), 503, None, b"busy"),
        (trickle(30, 0.001), 206, RIGHT, BODY[10:110]),
        (flip(-1), 206, RIGHT, BODY[10:109] + bytes([BODY[109] ^ 1])),
        (shorten(3), 206, RIGHT, BODY[10:107]),
        (lengthen(3), 206, RIGHT, BODY[10:110] + bytes(3)),
        (misplace(WRONG), 206, WRONG, BODY[10:110]),
        (unrange, 200, None, BODY[10:110]),
        (ignore_range, 200, None, BODY),
    ],
    ids=["say", "trickle", "flip", "shorten", "lengthen", "misplace", "unrange", "ignore_range"],
)
def test_answers_are_changed(
    proxy: FaultProxy, how: How, status: int, content_range: str | None, body: bytes
) -> None:
    proxy.faults(Fault(how))
    got, headers, data = ranged(proxy)
    assert (got, headers.get("Content-Range"), data) == (status, content_range, body)
    assert int(headers["Content-Length"]) == len(body)

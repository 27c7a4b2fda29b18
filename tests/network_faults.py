"""What can go wrong between a client and a server, for ``fault_proxy``."""

from __future__ import annotations

import dataclasses
import http.client
import os
import signal
from collections.abc import Callable, Iterable

import psutil
from fault_proxy import Answer, Exchange, How


def drop(exchange: Exchange) -> None:
    """The connection is cut before the server hears of the request."""
    exchange.hang_up()


def lose_answer(exchange: Exchange) -> None:
    """The server does what it was asked to, and the connection is cut before its answer."""
    heard(exchange)
    exchange.hang_up()


def keep_answer(exchange: Exchange) -> None:
    """The server does what it was asked to, and nothing comes of it."""
    heard(exchange)
    exchange.wait_for_client()


def say(status: int, body: bytes = b"", **headers: str) -> How:
    """The answer is that one, and the server hears nothing: ``say(503, Retry_After="0")``."""
    named = tuple((name.replace("_", "-"), value) for name, value in headers.items())

    def how(exchange: Exchange) -> None:
        exchange.unread()
        reason = http.client.responses.get(status, "")
        exchange.send(Answer(status=status, reason=reason, headers=named).holding(body))

    return how


def drop_within(after: int) -> How:
    """The connection is cut after so many bytes of the body: fewer than were promised."""

    def how(exchange: Exchange) -> None:
        _send_some(exchange, after)
        exchange.hang_up()

    return how


def stall(after: int | None = None) -> How:
    """Nothing comes any more after so many bytes of the body; None: nothing at all comes."""

    def how(exchange: Exchange) -> None:
        if after is not None:
            _send_some(exchange, after)
        exchange.wait_for_client()

    return how


def trickle(step: int, pause: float) -> How:
    """The body comes in so many bytes at a time, with so many seconds between."""

    def how(exchange: Exchange) -> None:
        answer = exchange.answered()
        exchange.send_head(answer.holding(answer.body))
        for start in range(0, len(answer.body), step):
            exchange.send_body(answer.body[start : start + step])
            exchange.pause(pause)

    return how


def edit(change: Callable[[Answer], Answer]) -> How:
    """The answer arrives, changed."""

    def how(exchange: Exchange) -> None:
        answer = exchange.answered()
        exchange.send(change(answer if exchange.command == "HEAD" else answer.holding(answer.body)))

    return how


def flip(at: int) -> How:
    """One byte of the body is another."""

    def change(answer: Answer) -> Answer:
        place = at % len(answer.body)
        wrong = bytes([answer.body[place] ^ 1])
        return answer.holding(answer.body[:place] + wrong + answer.body[place + 1 :])

    return edit(change)


def shorten(by: int) -> How:
    """The body ends early, and its length says so."""
    return edit(lambda answer: answer.holding(answer.body[:-by]))


def lengthen(by: int) -> How:
    """The body is longer, and its length says so."""
    return edit(lambda answer: answer.holding(answer.body + bytes(by)))


def misplace(content_range: str) -> How:
    """The answer says that it is another range: ``bytes 0-99/1000``."""
    return edit(lambda answer: answer.having("Content-Range", content_range))


def unrange(exchange: Exchange) -> None:
    """The range comes, but the answer says that it is the whole: 200 instead of 206."""
    answer = exchange.answered().having("Content-Range", None)
    exchange.send(dataclasses.replace(answer.holding(answer.body), status=200, reason="OK"))


def ignore_range(exchange: Exchange) -> None:
    """The whole comes, with 200: no server that checks a signature over Range lets that pass."""
    answer = exchange.answered(without="range")
    exchange.send(answer.holding(answer.body))


def kill(victims: Callable[[Exchange], Iterable[int]], at: Callable[[Exchange], object]) -> How:
    """Processes die in the middle of a request; nobody gets an answer.

    Args:
        victims: their ids: ``client``, or anybody's.
        at: what the server gets to hear before that: ``unheard``, half or all of it.
    """

    def how(exchange: Exchange) -> None:
        at(exchange)
        for process in victims(exchange):
            os.kill(process, signal.SIGKILL)
        exchange.wait_for_client()

    return how


def client(exchange: Exchange) -> list[int]:
    """The process that sent the request, from this machine."""
    ends = exchange.client_address[1], exchange.server.server_address[1]
    found = psutil.net_connections("tcp4")
    return [c.pid for c in found if c.pid and c.raddr and (c.laddr.port, c.raddr.port) == ends]


def node(exchange: Exchange) -> list[int]:
    """The raylet that started the process that sent the request, and all that it started."""
    (worker,) = client(exchange)
    raylet = psutil.Process(worker).parent()
    assert raylet is not None
    return [each.pid for each in (raylet, *raylet.children(recursive=True))]


def unheard(_: Exchange) -> None:
    """Nothing."""


def heard(exchange: Exchange) -> None:
    """All of it, and the server does what it was asked to."""
    exchange.seen.status = exchange.answered().status


def _send_some(exchange: Exchange, after: int) -> None:
    """The head, which promises all, and some of the body."""
    answer = exchange.answered()
    assert after < len(answer.body), "nothing would be missing"
    exchange.send_head(answer.having("Transfer-Encoding", None).holding(answer.body))
    exchange.send_body(answer.body[:after])

"""Stands between a client and a server, and cuts their connections."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from urllib.parse import urlsplit


class Proxy:
    """Forwards TCP connections; cuts those that carry ``marked`` after so many bytes of answer.

    Args:
        cuts: bytes of answer that the first marked connection may carry, the second, and so on;
            those after the last are not cut.
        dead: they are not cut but stay open, and nothing passes them any more.
    """

    def __init__(self, address: str, marked: bytes, cuts: list[int], *, dead: bool = False) -> None:
        parts = urlsplit(address)
        assert parts.hostname is not None
        assert parts.port is not None
        self._server = (parts.hostname, parts.port)
        self._marked, self._cuts, self._dead = marked, cuts, dead
        self.cut = 0
        """Connections that were cut, or went dead, so far."""
        self._closed = threading.Event()
        self._open: set[socket.socket] = set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._down = threading.Event()
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def left(self) -> int:
        """Connections that are still to be cut."""
        return len(self._cuts)

    @contextlib.contextmanager
    def down(self) -> Iterator[None]:
        """Every connection is cut, and new ones are cut at once."""
        self._down.set()
        for each in list(self._open):
            _cut(each)
        yield
        self._down.clear()

    def close(self) -> None:
        """End it, and every connection."""
        self._closed.set()
        _cut(self._listener)
        for each in list(self._open):
            _cut(each)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                client, _ = self._listener.accept()
                if self._down.is_set():
                    _cut(client)
                    continue
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        server = socket.create_connection(self._server)
        self._open |= {client, server}
        try:
            request = client.recv(65536)
            server.sendall(request)
            limited = self._marked in request and bool(self._cuts)
            allowed = self._cuts.pop(0) if limited else None
            threading.Thread(target=_forward, args=(client, server), daemon=True).start()
            if _forward(server, client, allowed):
                self.cut += 1
                if self._dead:
                    self._closed.wait()
        except OSError:
            pass
        finally:
            self._open -= {client, server}
            _cut(client)
            _cut(server)


def _forward(source: socket.socket, target: socket.socket, allowed: int | None = None) -> bool:
    """Returns whether it ended because no more was allowed."""
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            part = data if allowed is None else data[:allowed]
            target.sendall(part)
            if allowed is not None:
                allowed -= len(part)
                if not allowed:
                    return True
        target.shutdown(socket.SHUT_WR)
    return False


def _cut(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
    connection.close()

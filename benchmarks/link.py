"""A network between a client and a server of this machine, no faster than it is told to be."""

from __future__ import annotations

import contextlib
import math
import socket
import threading
from urllib.parse import urlsplit

from throttled import Gate

PIECE_BYTES = 128 << 10
"""Passed on at a time: little beside what a connection carries in a tenth of a second."""


class Link:
    """Forwards connections to a server, each and all of them at their speed.

    Args:
        link: bytes a second of all connections together, each way.
        connection: of each of them, each way.
    """

    def __init__(self, address: str, link: float, connection: float = math.inf) -> None:
        parts = urlsplit(address)
        self._server = (str(parts.hostname), int(parts.port or 80))
        self._connection = connection
        self._up, self._down = Gate(link), Gate(link)
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.address = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Accept no more."""
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(self._server)
                for source, target, whole in (
                    (client, server, self._up),
                    (server, client, self._down),
                ):
                    gates = (Gate(self._connection), whole)
                    threading.Thread(
                        target=_forward, args=(source, target, gates), daemon=True
                    ).start()


def _forward(source: socket.socket, target: socket.socket, gates: tuple[Gate, ...]) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(PIECE_BYTES):
            for gate in gates:
                gate.take(len(data))
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)

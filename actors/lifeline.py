"""Whether the driver still has its cluster: the head, and the raylet of its own node.

Ray ends a driver that has lost one of them by itself, at some call after the raylet's death and a
minute after the head's, from within its C++ part: nothing could be said or tidied any more. So the
driver looks first. A process that is gone refuses a connection at once; a machine that is gone
answers nothing.
"""

from __future__ import annotations

import socket
import time
from dataclasses import dataclass, field

import ray

from merge_core.errors import RaymeldError

LOOK_SECONDS = 0.5
"""Between two looks, each of which takes a tenth of a millisecond on a network of one's own."""

ANSWER_SECONDS = 1.0
"""For the answer to a look; the driver does nothing else meanwhile."""

HEAD_SECONDS = 10.0
"""How long the head may be silent. A head that keeps its state elsewhere (GCS fault tolerance) may
come back; Ray's own limit is 60 s, and must not come first."""


@dataclass(slots=True)
class Lifeline:
    """The driver's connection to its cluster, as ``host:port`` of both ends of it."""

    head: str
    raylet: str
    _looked: float = field(default=0.0, init=False)
    _silent_since: float | None = field(default=None, init=False)

    @classmethod
    def of_this_driver(cls) -> Lifeline:
        """Of the Ray that this process is connected to."""
        here = ray.get_runtime_context()
        (node,) = (n for n in ray.nodes() if n["NodeID"] == here.get_node_id())
        raylet = f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}"
        return cls(head=here.gcs_address, raylet=raylet)

    def look(self) -> None:
        """Look, unless that was done a moment ago.

        Raises:
            RaymeldError: the cluster is gone for this driver.
        """
        if time.monotonic() - self._looked >= LOOK_SECONDS:
            self.look_now()

    def look_now(self) -> None:
        """Look, whenever that was done.

        Raises:
            RaymeldError: the cluster is gone for this driver.
        """
        if not _answers(self.raylet):  # it never comes back: the next one would be another node
            raise _gone("Ray's node on the driver's machine is gone", self.raylet)
        self._looked = time.monotonic()
        if _answers(self.head):
            self._silent_since = None
            return
        self._silent_since = self._silent_since or self._looked
        if time.monotonic() - self._silent_since >= HEAD_SECONDS:
            what = f"the cluster's head is gone: no answer for {HEAD_SECONDS:.0f} s"
            raise _gone(what, self.head)


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), ANSWER_SECONDS).close()
    except OSError:
        return False
    return True


def _gone(what: str, where: str) -> RaymeldError:
    return RaymeldError(
        what,
        where,
        "Nothing was published. Start the cluster again if it does not do so by itself; the same"
        " command then goes on where this one stopped.",
    )

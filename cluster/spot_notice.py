"""The sidecar of a spot machine: turns the cloud's notice into a drain of the Ray nodes on it.

Ray itself learns of a spot notice from nobody. A drained node gets no new work, and everybody who
asks Ray sees until when it lives; a node that only vanishes is missed some 15 seconds later.
"""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Callable, Collection
from typing import Any

import psutil

from cluster.authentication import reload_authentication, use_token_if_there_is_one
from cluster.metadata import METADATA_URL, Cloud, MetadataError, Notice, find_cloud
from merge_core.errors import RaymeldError, refuse

POLL_SECONDS = 2.0
"""AWS recommends to look every 5 seconds, but GCP takes a machine back within 30."""

SPARE_SECONDS = 5.0
"""How long before the end a node is said to be gone, for its last write to arrive."""

CONNECT_SECONDS = 3.0
"""How long Ray's head may take to accept a connection."""

Say = Callable[[str], None]


def watch(
    address: str, say: Say, *, metadata_url: str = METADATA_URL, poll: float = POLL_SECONDS
) -> None:
    """Wait until the cloud takes this machine back, then drain every Ray node on it.

    Returns only once Ray has accepted the drain; on a machine that nobody takes back, never.

    Args:
        address: of Ray's head, ``host:port``.
        say: called with every line that a person may want to read.
        poll: seconds between two looks at the metadata service.

    Raises:
        InputError: no address, or this machine is in no cloud whose notices are known.
        RaymeldError: the end came before Ray could be told.
    """
    if not re.fullmatch(r"[^\s/]+:\d+", address):
        remedy = "Give the head's host and port, such as head:6379"
        raise refuse(f"{address!r} is no address of Ray's head", "--address", remedy)
    cloud = find_cloud(metadata_url)
    if cloud is None:
        raise refuse(
            "neither the metadata service of AWS nor that of GCP answers",
            metadata_url,
            "Run spot-notice on the spot machines of these two clouds, and nowhere else",
        )
    say(f"watching for a spot notice of {cloud.name}")
    notice = await_notice(cloud, say, poll)
    left = notice.end - time.time()
    say(f"{notice.cloud} will {notice.action} this machine in {left:.0f} s: draining its Ray nodes")
    for node in drain(address, notice, own_addresses(), say, poll):
        say(f"Ray drains node {node}")


def await_notice(cloud: Cloud, say: Say, poll: float) -> Notice:
    """Ask until there is a notice, through any trouble; each trouble is told once, and its end."""
    trouble = False
    while True:
        try:
            notice = cloud.notice()
        except MetadataError as error:
            if not trouble:
                say(f"{cloud.name} cannot be asked, trying on: {error}")
            trouble = True
        else:
            if trouble:
                say(f"{cloud.name} answers again")
            trouble = False
            if notice is not None:
                return notice
        time.sleep(poll)


def own_addresses() -> frozenset[str]:
    """The IP addresses of this machine's interfaces."""
    interfaces = psutil.net_if_addrs().values()
    return frozenset(found.address for addresses in interfaces for found in addresses)


def drain(
    address: str, notice: Notice, addresses: Collection[str], say: Say, poll: float
) -> list[str]:
    """Have Ray drain its nodes at ``addresses``, trying until the machine ends; returns their ids.

    Raises:
        RaymeldError: the end came before Ray accepted it; says what stood in the way.
    """
    use_token_if_there_is_one()  # before Ray is imported: it reads the environment then
    reload_authentication()
    told = ""
    while True:
        try:
            return _drain(address, notice, addresses)
        except Exception as error:  # noqa: BLE001 - Ray's own kinds have no common root
            reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        if reason != told:
            say(f"not drained yet: {reason}")
        told = reason
        if time.time() + poll > notice.end:
            raise RaymeldError(f"not drained in time: {told}", address)
        time.sleep(poll)


def _drain(address: str, notice: Notice, addresses: Collection[str]) -> list[str]:
    from ray._raylet import GcsClient  # type: ignore[attr-defined]
    from ray.core.generated import autoscaler_pb2

    reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    deadline = int((notice.end - SPARE_SECONDS) * 1000)
    _check_reachable(address)
    gcs = GcsClient(address=address)
    nodes = [node for node in _live_nodes(gcs) if node[1] in addresses]
    if not nodes:
        raise RaymeldError("Ray knows no live node on this machine", address)
    for node, _ in nodes:
        message = f"{notice.cloud} spot notice: {notice.action}"
        accepted, why = gcs.drain_node(node, reason, message, deadline)
        if not accepted:
            raise RaymeldError(f"Ray refuses to drain node {node}: {why}", address)
    return [node for node, _ in nodes]


def _check_reachable(address: str) -> None:
    """Ray's own client waits 40 seconds for a head that is not there: longer than GCP gives."""
    host, _, port = address.rpartition(":")
    socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()


def _live_nodes(gcs: Any) -> list[tuple[str, str]]:
    """Id, in hexadecimal, and address of each live node."""
    from ray.core.generated.gcs_pb2 import GcsNodeInfo

    return [
        (node.hex(), info.node_manager_address)
        for node, info in gcs.get_all_node_info().items()
        if info.state == GcsNodeInfo.ALIVE
    ]

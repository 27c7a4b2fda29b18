"""Ray clusters of several nodes, all on this machine, in processes of their own."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
from head import free_ports, until

NOTICED_AT_ONCE = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 500,
    "health_check_failure_threshold": 3,
}
"""A node's death is known after a second or two; Ray's own setting takes fifteen."""

NO_DASHBOARD = {"include_dashboard": False, "dashboard_port": None}
"""Else Ray tries its port all the same, and leaves a socket open where another dashboard has it."""


@contextlib.contextmanager
def environment(**changes: str) -> Iterator[None]:
    """What Ray's processes that are started inside get to see."""
    before = dict(os.environ)
    os.environ |= {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", **changes}
    try:
        yield
    finally:
        os.environ.clear()
        os.environ |= before


@contextlib.contextmanager
def cluster(
    *, cpus: int, system: dict[str, Any] | None = None, metrics_port: int | None = None
) -> Iterator[Any]:
    """A head with ``cpus``; yields Ray's ``Cluster``, which takes more nodes."""
    from ray._common.utils import get_default_ray_temp_dir
    from ray.cluster_utils import Cluster

    with environment():
        Path(get_default_ray_temp_dir()).mkdir(parents=True, exist_ok=True)  # Cluster writes there
        head: dict[str, Any] = {"num_cpus": cpus, **NO_DASHBOARD}
        if system is not None:
            head["_system_config"] = system
        if metrics_port is not None:
            head["metrics_export_port"] = metrics_port
        nodes = Cluster(initialize_head=True, head_node_args=head)
        try:
            yield nodes
        finally:
            nodes.shutdown()


@contextlib.contextmanager
def running_cluster(cpus: int = 4, **changes: str) -> Iterator[str]:
    """A head node in processes of its own; yields its address."""
    with environment(**changes), cluster(cpus=cpus) as nodes:
        yield nodes.address


@contextlib.contextmanager
def joined(
    address: str, *, cpus: int, label: str, gpus: int = 0, mounts: str = "", **changes: str
) -> Iterator[psutil.Process]:
    """``ray start --block`` of one more node, as a machine's own service runs it.

    Args:
        mounts: shell commands that change what the node sees of the file system, and nobody else.
    """
    ports = free_ports(3)
    names = "dashboard-agent-listen", "dashboard-agent-grpc", "metrics-export"
    command = [
        *(Path(sys.executable).with_name("ray"), "start", "--block", f"--address={address}"),
        *(f"--num-cpus={cpus}", f"--num-gpus={gpus}", f"--labels={label}"),
        "--object-store-memory=100000000",
        *(f"--{name}-port={port}" for name, port in zip(names, ports, strict=True)),
        *("--min-worker-port=0", "--max-worker-port=0", "--disable-usage-stats"),
    ]
    if mounts:
        command = ["unshare", "--mount", "sh", "-ec", f'{mounts}\nexec "$0" "$@"', *command]
    with environment(**changes):
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
    assert process.stdout is not None
    said: list[str] = []
    while "Ray runtime started" not in "".join(said):
        said.append(process.stdout.readline())
        assert said[-1], "".join(said)
    node = psutil.Process(process.pid)
    family = [node, *node.children(recursive=True)]
    try:
        yield node
    finally:
        for each in [*family, *(node.children(recursive=True) if node.is_running() else [])]:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.send_signal(signal.SIGKILL)
        process.communicate()


def until_gone(processes: list[psutil.Process], seconds: float = 30) -> None:
    """Wait until every one of them has ended."""
    until(lambda: not any(alive(each) for each in processes), seconds, f"the end of {processes}")


def alive(process: psutil.Process) -> bool:
    """Whether it runs; a zombie does not."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False

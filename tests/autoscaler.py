"""A Ray cluster whose own autoscaler starts and stops worker nodes, all on this machine."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil

IDLE_MINUTES = 0.05

HEAD = "ray.head.default"
"""What the fake provider calls the type of the head, whatever the file says."""


@contextlib.contextmanager
def autoscaling_cluster(cpus: int, most: int) -> Iterator[str]:
    """A head without CPUs, and from 0 to ``most`` nodes of ``cpus`` each; yields the address."""
    from ray.util import get_node_ip_address

    with socket.socket() as free:
        free.bind(("", 0))
        address = f"{get_node_ip_address()}:{free.getsockname()[1]}"
    directory = Path(tempfile.mkdtemp(prefix="grow-", dir="/tmp"))  # short: it holds sockets
    config = directory / "cluster.json"
    config.write_text(json.dumps(_config(address, {"CPU": cpus}, most)))
    process = _start(address, config, directory)
    try:
        yield address
    finally:
        _stop(process, directory)
        shutil.rmtree(directory, ignore_errors=True)


def _config(address: str, resources: Mapping[str, int], most: int) -> dict[str, Any]:
    """Ray's fake provider starts a raylet where another one would start a machine."""
    from ray.autoscaler._private.fake_multi_node import node_provider as fake

    provider = {
        "type": "external",
        "module": f"{fake.__name__}.FakeMultiNodeProvider",
        "use_node_id_as_ip": True,
        "disable_node_updaters": True,
        "disable_launch_config_check": True,
        "gcs_address": address,
        "launch_multiple": True,
        "head_node_id": fake.FAKE_HEAD_NODE_ID,
    }
    worker = {"resources": {**resources, "object_store_memory": 100_000_000}, "node_config": {}}
    types = {
        HEAD: {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
        "worker": {**worker, "min_workers": 0, "max_workers": most},
    }
    lists = ["initialization_commands", "setup_commands", "head_setup_commands"]
    lists += ["worker_setup_commands", "head_start_ray_commands", "worker_start_ray_commands"]
    lists += ["cluster_synced_files", "rsync_exclude", "rsync_filter"]
    return {
        "cluster_name": "grows",
        "max_workers": most,
        "upscaling_speed": 10.0,
        "idle_timeout_minutes": IDLE_MINUTES,
        "provider": provider,
        "available_node_types": types,
        "head_node_type": HEAD,
        **{key: {} for key in ("auth", "docker", "file_mounts")},
        **{key: [] for key in lists},
        "file_mounts_sync_continuously": False,
    }


def _start(address: str, config: Path, directory: Path) -> subprocess.Popen[str]:
    from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID

    command = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block"]
    command += [f"--port={address.rpartition(':')[2]}", f"--autoscaling-config={config}"]
    command += [f"--temp-dir={directory}", "--num-cpus=0", "--object-store-memory=100000000"]
    command += ["--include-dashboard=false", "--disable-usage-stats"]
    environment = {
        **os.environ,
        "RAY_AUTH_MODE": "disabled",
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    }
    process = subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    said: list[str] = []
    for line in iter(process.stdout.readline, ""):
        said.append(line)
        if "Ray runtime started" in line:
            return process
    raise AssertionError("".join(said))


def _stop(process: subprocess.Popen[str], directory: Path) -> None:
    """Everything that names the directory, which is all that this cluster started."""
    ours = [
        one
        for one in psutil.process_iter(["cmdline"])
        if one.pid != os.getpid() and str(directory) in " ".join(one.info["cmdline"] or [])
    ]
    for one in {*ours, *(c for o in ours for c in _children(o)), *_children(process)}:
        with contextlib.suppress(psutil.Error):
            one.kill()
    process.kill()
    process.communicate()


def _children(process: psutil.Process | subprocess.Popen[str]) -> list[psutil.Process]:
    with contextlib.suppress(psutil.Error):
        return psutil.Process(process.pid).children(recursive=True)
    return []

"""The cluster itself dies under a merge: one paragraph, nothing published, and it goes on later."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from clusters import cluster
from handmade import assert_no_checkpoint, published
from head import until

from actors import lifeline
from actors.lifeline import Lifeline
from cluster.driver import merge_on_ray
from cluster.workers import ClusterOptions
from merge_core.errors import RaymeldError
from merge_core.merge import merge
from merge_core.plan import MergePlan

DRIVER = """
import sys
import faults
import typer
from cluster.answering import answering
from cluster.driver import merge_on_ray
from cluster.workers import ClusterOptions
from merge_core.planner import make_plan

base, adapter, out, address = sys.argv[1:]
faults.by_value()
plan = make_plan(base, [adapter], shard_bytes=18_000)
options = ClusterOptions(address=address, device="cpu", merger=faults.StopsAtTheThird)
try:
    with answering(as_json=False, debug=False):
        merge_on_ray(plan, out, options, watch=lambda _: None, say=lambda _: None)
except typer.Exit as ended:
    sys.exit(ended.exit_code)
"""


@contextlib.contextmanager
def listening() -> Iterator[tuple[str, socket.socket]]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}", server


def test_a_head_that_is_silent_for_a_while_now_and_then_is_not_gone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with listening() as (raylet, _), listening() as (head, server):
        watched = Lifeline(head=head, raylet=raylet)
        server.close()
        watched.look_now()
        now += lifeline.HEAD_SECONDS - 1
        watched.look_now()
        port = int(head.rpartition(":")[2])
        with socket.create_server(("127.0.0.1", port)):
            watched.look_now()
        now += 2
        watched.look_now()


def test_a_head_that_stays_silent_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    with listening() as (raylet, _), listening() as (head, server):
        server.close()
        watched = Lifeline(head=head, raylet=raylet)
        watched.look_now()
        now = time.monotonic()
        monkeypatch.setattr(time, "monotonic", lambda: now + lifeline.HEAD_SECONDS)
        with pytest.raises(RaymeldError, match=f"{head}: the cluster's head is gone"):
            watched.look_now()


@pytest.fixture(scope="module")
def expected(small: MergePlan, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("inline") / "out"
    merge(small, out)
    return published(out)


@pytest.fixture(scope="module")
def another() -> Iterator[str]:
    """The address of the cluster that comes after the dead one."""
    with cluster(cpus=1) as nodes:
        yield nodes.address


def kill(nodes: Any, victims: str) -> None:
    if "head" in victims:
        nodes.head_node.kill_gcs_server(check_alive=False)
    if "raylet" in victims:
        nodes.head_node.kill_raylet(check_alive=False)


@pytest.mark.parametrize(
    ("victims", "said"),
    [
        ("raylet", "Ray's node on the driver's machine is gone"),
        ("head", "the cluster's head is gone: no answer for 10 s"),
    ],
)
def test_a_cluster_that_dies_ends_the_merge_in_one_paragraph_and_another_goes_on(
    small: MergePlan,
    expected: dict[str, bytes],
    another: str,
    tmp_path: Path,
    victims: str,
    said: str,
) -> None:
    out = tmp_path / "out"
    with cluster(cpus=1) as nodes:
        command = [sys.executable, "-c", DRIVER, str(small.base), str(small.adapters[0].path), out]
        driver = subprocess.Popen(
            [*map(str, command), nodes.address],
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        until(lambda: out.with_name("stopped").exists() or driver.poll() is not None)
        kill(nodes, victims)
        output, error = driver.communicate(timeout=60)

    assert driver.returncode == 1, error
    (paragraph,) = error.splitlines()
    assert said in paragraph
    assert paragraph.endswith("the same command then goes on where this one stopped.")
    assert output == ""
    assert_no_checkpoint(out)

    heard: list[str] = []
    options = ClusterOptions(address=another, device="cpu")
    merge_on_ray(small, out, options, watch=lambda _: None, say=heard.append)
    assert f"2 of {len(small.shards)} shards were there and are proven" in heard
    assert published(out) == expected

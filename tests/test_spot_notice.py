"""The sidecar of spot machines, against a metadata service over HTTP and a real Ray."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
import ray
from clusters import NO_DASHBOARD
from metadata_service import AWS_ACTION, AWS_TOKEN, serving

from cluster.metadata import Aws, Gcp, MetadataError, Notice, find_cloud
from cluster.session import reload_authentication
from cluster.spot_notice import SPARE_SECONDS, await_notice, drain, watch
from merge_core.errors import InputError, RaymeldError

END = 1_800_000_000
QUICK = 0.01


def aws_notice(end: float = END, action: str = "terminate") -> str:
    at = datetime.fromtimestamp(end, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return json.dumps({"action": action, "time": at})


def until(true: Callable[[], object], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it never came true"
        time.sleep(QUICK)


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A port at which nobody listens: bound, so that nobody else can take it meanwhile."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield bound.getsockname()[1]


@pytest.mark.parametrize(("cloud", "kind"), [("AWS", Aws), ("GCP", Gcp)])
def test_a_machine_knows_its_cloud(cloud: str, kind: type) -> None:
    with serving(cloud) as service:
        found = find_cloud(service.url, attempts=1)

        assert isinstance(found, kind)
        assert found.notice() is None


def test_a_cloud_whose_service_comes_up_late_is_found() -> None:
    with serving("GCP", faults=2) as service:
        assert isinstance(find_cloud(service.url, attempts=2, pause=QUICK), Gcp)
    with serving("AWS", faults=2) as service:  # of the first attempt, one question a cloud
        assert isinstance(find_cloud(service.url, attempts=2, pause=QUICK), Aws)


@pytest.mark.parametrize("refuse", [False, True])
def test_what_is_no_known_cloud_is_taken_for_none(refuse: bool, closed_port: int) -> None:
    with serving("AWS" if refuse else "another", refuse_tokens=refuse) as service:
        assert find_cloud(service.url, attempts=2, pause=QUICK) is None
    assert find_cloud(f"http://127.0.0.1:{closed_port}", attempts=1) is None


@pytest.mark.parametrize("action", ["terminate", "stop", "hibernate"])
def test_aws_says_what_and_when(action: str) -> None:
    with serving("AWS", notice=aws_notice(action=action)) as service:
        assert Aws(service.url).notice() == Notice(cloud="AWS", action=action, end=END)


def test_gcp_gives_thirty_seconds() -> None:
    with serving("GCP", notice="TRUE") as service:
        notice = Gcp(service.url).notice()

    assert notice is not None
    assert (notice.cloud, notice.action) == ("GCP", "terminate")
    assert 25 < notice.end - time.time() <= 30


def test_a_token_of_aws_that_expired_is_replaced() -> None:
    with serving("AWS") as service:
        cloud = find_cloud(service.url, attempts=1)
        assert cloud is not None
        assert cloud.notice() is None
        before = list(service.asked)
        service.expire()
        service.notice = aws_notice()

        assert cloud.notice() == Notice(cloud="AWS", action="terminate", end=END)
    asked = service.asked[len(before) :]
    assert asked == [f"GET {AWS_ACTION}", f"PUT {AWS_TOKEN}", f"GET {AWS_ACTION}"]


@pytest.mark.parametrize(
    ("cloud", "said"),
    [("AWS", "<html>"), ("AWS", "[]"), ("AWS", '{"action": "stop"}'), ("GCP", "<html>")],
)
def test_an_answer_that_cannot_be_understood_is_no_notice(cloud: str, said: str) -> None:
    with serving(cloud, notice=said) as service, pytest.raises(MetadataError):
        (Aws if cloud == "AWS" else Gcp)(service.url).notice()


@pytest.mark.parametrize(("cloud", "notice"), [("AWS", aws_notice()), ("GCP", "TRUE")])
def test_trouble_with_the_service_is_survived_and_told_once(cloud: str, notice: str) -> None:
    said: list[str] = []
    with serving(cloud) as service:
        found = find_cloud(service.url, attempts=1)
        assert found is not None
        service.faults, service.notice = 5, notice

        assert await_notice(found, said.append, QUICK).cloud == cloud
    assert service.faults == 0
    assert said == [
        f"{cloud} cannot be asked, trying on: {service.url}: HTTP status 503",
        f"{cloud} answers again",
    ]


def test_a_refused_token_is_survived_and_told_once() -> None:
    said: list[str] = []

    with serving("AWS") as service:
        cloud = find_cloud(service.url, attempts=1)
        assert cloud is not None
        service.expire()
        service.refuse_tokens, service.notice = True, aws_notice()
        original = service.answer

        def answer(method: str, path: str, headers: object) -> tuple[int, str]:
            service.refuse_tokens = service.asked.count(f"PUT {AWS_TOKEN}") < 4
            return original(method, path, headers)

        service.answer = answer  # type: ignore[method-assign]
        assert await_notice(cloud, said.append, QUICK).end == END
    assert said == [
        f"AWS cannot be asked, trying on: {service.url}: no new token: HTTP status 403",
        "AWS answers again",
    ]


def test_a_service_that_vanishes_is_survived_and_told_once() -> None:
    class VanishedError(Exception):
        pass

    said: list[str] = []
    with serving("GCP") as service:
        cloud = Gcp(service.url)
    looks = iter(range(4))
    original = cloud.notice

    def look() -> Notice | None:
        if next(looks, None) is None:
            raise VanishedError
        return original()

    cloud.notice = look  # type: ignore[method-assign]
    with pytest.raises(VanishedError):
        await_notice(cloud, said.append, QUICK)
    assert len(said) == 1
    assert "Connection refused" in said[0]


@contextlib.contextmanager
def sidecar(*words: str, home: Path, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """The command, as a process that does not outlive the block, whatever happens in it."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    with subprocess.Popen(
        [str(Path(sys.executable).with_name("raymeld")), "spot-notice", *words],
        env={**kept, "HOME": str(home), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def test_on_neither_cloud_it_says_so_and_ends_with_2(tmp_path: Path, closed_port: int) -> None:
    url = f"http://127.0.0.1:{closed_port}"
    with sidecar("--address", "head:6379", home=tmp_path, RAYMELD_METADATA_URL=url) as process:
        _, complaint = process.communicate(timeout=60)

    assert process.returncode == 2
    assert "neither the metadata service of AWS nor that of GCP answers" in complaint


@pytest.mark.parametrize("address", ["auto", "http://head:8265", "head:", ""])
def test_an_address_that_is_none_is_refused_before_anything_else(address: str) -> None:
    with pytest.raises(InputError, match="is no address of Ray's head"):
        watch(address, lambda _: None)


TOKEN = "0123456789abcdef" * 4


@pytest.fixture(scope="module")
def ray_address() -> Iterator[str]:
    """Ray that asks for a token: its head at another address, one node at this machine's."""
    from ray._common.utils import get_default_ray_temp_dir
    from ray.cluster_utils import Cluster

    before = dict(os.environ)
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0"}
    reload_authentication()
    Path(get_default_ray_temp_dir()).mkdir(parents=True, exist_ok=True)  # Cluster writes there
    head = {"num_cpus": 0, "node_ip_address": "127.0.0.2", **NO_DASHBOARD}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        cluster.add_node(num_cpus=1)
        ray.init(address=cluster.address, log_to_driver=False, logging_level="error")
        yield cluster.address
    finally:
        ray.shutdown()
        cluster.shutdown()
        os.environ.clear()
        os.environ |= before
        reload_authentication()


def draining() -> dict[str, int]:
    """Ids of nodes that Ray drains, and until when in milliseconds since the epoch."""
    return ray._private.state.state.get_draining_nodes()


@ray.remote(num_cpus=1)
class Busy:
    """Keeps its node from being idle: an idle node that is drained leaves at once."""

    def where(self) -> str:
        return ray.get_runtime_context().get_node_id()


def test_a_notice_drains_the_nodes_of_this_machine_and_no_others(
    ray_address: str, tmp_path: Path
) -> None:
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text(TOKEN)
    actor = Busy.remote()
    node = ray.get(actor.where.remote())
    end = int(time.time()) + 120
    with serving("AWS") as service:
        words = ["--address", ray_address, "--metadata-url", service.url]
        with sidecar(*words, home=tmp_path) as process:
            until(lambda: service.asked.count(f"GET {AWS_ACTION}") >= 2)
            assert draining() == {}

            service.notice = aws_notice(end)
            until(draining)
            _, said = process.communicate(timeout=60)

    assert draining() == {node: (end - SPARE_SECONDS) * 1000}
    assert process.returncode == 0, said
    first, second, third = said.splitlines()
    assert first == "watching for a spot notice of AWS"
    assert second.startswith("AWS will terminate this machine in ")
    assert third == f"Ray drains node {node}"
    assert ray.get(actor.where.remote()) == node, "a drain lets what runs go on"


def test_a_machine_without_a_ray_node_says_so_until_it_ends(
    ray_address: str,
) -> None:
    said: list[str] = []
    notice = Notice(cloud="GCP", action="terminate", end=time.time() + 0.2)

    with pytest.raises(RaymeldError, match=r"not drained in time.*no live node on this machine"):
        drain(ray_address, notice, {"192.0.2.99"}, said.append, QUICK)

    assert len(said) == 1


def test_a_ray_that_cannot_be_reached_is_tried_until_the_machine_ends(closed_port: int) -> None:
    said: list[str] = []
    notice = Notice(cloud="GCP", action="terminate", end=time.time() + 0.2)

    with pytest.raises(RaymeldError, match=r"not drained in time.*refused"):
        drain(f"127.0.0.1:{closed_port}", notice, {"192.0.2.99"}, said.append, QUICK)

    assert len(said) == 1

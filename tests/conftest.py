"""Settings and fixtures of the whole suite: checkpoints and adapters that are made once."""

from __future__ import annotations

import dataclasses
import datetime as dt
import itertools
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach the network
# bitsandbytes says at import that a faster kernel is missing, behind pytest's own last line.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

import pytest
import torch
from backends import BACKENDS, make_parts_small
from fault_proxy import FaultProxy
from gcs_server import Gcs
from handmade import TWO_LANES, small_merge
from hub_client import HubClient
from hub_server import Hub
from hub_target import Target
from hypothesis import settings
from merged_by_hand import merged_names, write_out
from models import DTYPES, make_adapter, make_base, oracle
from moe import make_moe
from pushes import TOKEN
from s3_server import ENVIRONMENT, s3_server
from scenes import AdapterScene, BaseScene
from transformers.utils.logging import disable_progress_bar
from tuners import make_tuned

from merge_core.merge import merge
from merge_core.plan import MergePlan
from merge_core.planner import make_plan
from merge_core.stores import blocks, gcs_client
from merge_core.stores.gcs import GcsStore
from merge_core.stores.location import Access, Location
from merge_core.stores.retries import Retries
from merge_core.stores.s3 import S3Store
from merge_core.stores.s3_client import client_for
from merge_core.stores.store import Store

disable_progress_bar()
settings.register_profile("suite", derandomize=True, deadline=None, database=None)
settings.load_profile("suite")

BUCKETS = itertools.count()


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes checkpoints, each kind once: ``bases("F16", shard="40KB", vocab_size=50)``."""
    made: dict[str, Path] = {}

    def make(dtype: str = "BF16", **options: Any) -> Path:
        key = repr((dtype, sorted(options.items())))
        if key not in made:
            path = tmp_path_factory.mktemp("bases") / "base"
            made[key] = make_base(path, dtype=DTYPES[dtype], **options)
        return made[key]

    return make


@pytest.fixture(scope="session")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes MoE checkpoints, each kind once: ``moe("F32", fused=True)``."""
    made: dict[str, Path] = {}

    def make(dtype: str = "BF16", **options: Any) -> Path:
        key = repr((dtype, sorted(options.items())))
        if key not in made:
            path = tmp_path_factory.mktemp("moe") / "base"
            made[key] = make_moe(path, dtype=DTYPES[dtype], **options)
        return made[key]

    return make


@pytest.fixture(scope="session")
def base(bases: Callable[..., Path]) -> Path:
    """A bf16 checkpoint in several files. Not to be changed: damage ``base_copy``."""
    return bases("BF16", shard="40KB")


@pytest.fixture(scope="session")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float32 adapter on every linear layer. Not to be changed: damage ``adapter_copy``."""
    return make_adapter(tmp_path_factory.mktemp("adapters") / "adapter", base, r=8, lora_alpha=12)


@pytest.fixture(scope="session")
def tuned(
    bases: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """Makes adapters of other tuners, each once: ``tuned("VERA", "F32")``. Not to be changed."""
    made: dict[tuple[str, str], Path] = {}

    def make(name: str, dtype: str = "BF16") -> Path:
        if (name, dtype) not in made:
            path = tmp_path_factory.mktemp("tuned") / "adapter"
            made[name, dtype] = make_tuned(path, bases(dtype, shard="80KB"), name)
        return made[name, dtype]

    return make


@pytest.fixture(scope="session")
def wanted(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """What PEFT makes of ``base`` and ``adapter``."""
    return oracle(base, adapter)


@pytest.fixture(scope="session")
def template(
    base: Path,
    adapter: Path,
    wanted: dict[str, torch.Tensor],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A finished merge that holds ``wanted``. Not to be changed: damage ``finished``."""
    out = tmp_path_factory.mktemp("template") / "out"
    return write_out(out, wanted, merged_names(adapter), base=base, adapters={adapter: 1.0})


@pytest.fixture(scope="session")
def plan(base: Path, adapter: Path) -> MergePlan:
    """The merge of ``adapter`` into ``base``, in three shards, not sealed."""
    return make_plan(base, [adapter], shard_bytes=70_000)


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> MergePlan:
    """The merge of checkpoint and adapter written by hand, in several shards, not sealed."""
    return small_merge(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A new directory for each example."""

    def make() -> Iterator[Path]:
        while True:
            path = tmp_path_factory.mktemp("example")
            yield path
            shutil.rmtree(path)

    return make()


@pytest.fixture
def base_copy(base: Path, tmp_path: Path) -> Path:
    return shutil.copytree(base, tmp_path / "base")


@pytest.fixture
def adapter_copy(adapter: Path, tmp_path: Path) -> Path:
    return shutil.copytree(adapter, tmp_path / "adapter")


@pytest.fixture
def finished(template: Path, tmp_path: Path) -> Path:
    """A finished merge for the test to damage."""
    return shutil.copytree(template, tmp_path / "out")


@pytest.fixture
def out(tmp_path: Path) -> Iterator[Path]:
    """Where to merge to; does not exist yet."""
    yield tmp_path / "out"
    shutil.rmtree(tmp_path / "out", ignore_errors=True)  # some are large


@pytest.fixture
def scene(tmp_path: Path, out: Path) -> BaseScene:
    """A small merge, whose base or destination the test spoils."""
    return BaseScene.make(tmp_path, out)


@pytest.fixture
def adapter_scene(tmp_path: Path, out: Path) -> AdapterScene:
    """A small merge, whose adapter the test spoils."""
    return AdapterScene.make(tmp_path, out)


@pytest.fixture(scope="session")
def s3_address() -> Iterator[str]:
    """Of an S3 of this worker's own, started for the first test that wants it."""
    with s3_server() as address:
        yield address


@pytest.fixture
def s3(s3_address: str, monkeypatch: pytest.MonkeyPatch) -> Location:
    """A new bucket in it, with credentials in the environment."""
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    access = Access(endpoint_url=s3_address)
    location = Location(scheme="s3", root=f"bucket-{next(BUCKETS)}", access=access)
    client_for(location.access).create_bucket(Bucket=location.root)
    return location


@pytest.fixture
def s3_proxy(s3: Location, s3_address: str) -> Iterator[FaultProxy]:
    with FaultProxy(s3_address) as proxy:
        yield proxy


@pytest.fixture
def s3_store(s3: Location, s3_proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> S3Store:
    """Reached through the proxy, by a client of its own that hardly pauses between tries."""
    make_parts_small(monkeypatch)
    monkeypatch.setattr(Retries, "seconds", lambda *_: 0.001)
    return S3Store(dataclasses.replace(s3 / "out", access=Access(endpoint_url=s3_proxy.address)))


@pytest.fixture(scope="session")
def gcs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gcs]:
    """A server that answers as Google Cloud Storage does, with one account."""
    with Gcs(tmp_path_factory.mktemp("gcs") / "key.json") as running:
        yield running


@pytest.fixture
def gs(gcs: Gcs, monkeypatch: pytest.MonkeyPatch) -> Location:
    """A new bucket in it, with credentials in the environment."""
    for name, value in gcs.environment().items():
        monkeypatch.setenv(name, value)
    gcs_client.login.cache_clear()
    location = Location(scheme="gs", root=f"bucket-{next(BUCKETS)}")
    gcs.buckets[location.root] = {}
    return location


@pytest.fixture
def gs_proxy(gs: Location, gcs: Gcs, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    with FaultProxy(gcs.address) as proxy:
        monkeypatch.setenv("GOOGLE_BASE_URL", proxy.address)
        yield proxy


@pytest.fixture
def gs_store(gs: Location, gs_proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> GcsStore:
    """Reached through the proxy, by a client that hardly pauses between tries."""
    make_parts_small(monkeypatch)
    monkeypatch.setattr(Retries, "seconds", lambda *_: 0.001)
    monkeypatch.setattr(gcs_client, "FIRST_PAUSE", dt.timedelta(milliseconds=1))
    return GcsStore(gs / "out")


@pytest.fixture(params=BACKENDS)
def make_store(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Callable[[], Store]:
    """Makes stores that hold nothing, of each kind."""
    make_parts_small(monkeypatch)
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 100_000)
    return BACKENDS[request.param](request)


@pytest.fixture
def store(make_store: Callable[[], Store]) -> Store:
    return make_store()


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    """An empty Hugging Face hub on this machine."""
    with Hub(tmp_path / "cas") as running:
        yield running


@pytest.fixture
def client(hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubClient]:
    """huggingface_hub, which goes to ``hub``."""
    made = HubClient(monkeypatch, tmp_path / "hf")
    made.use(hub.address)
    yield made
    made.close()


@pytest.fixture
def before_hub(
    hub: Hub, client: HubClient, monkeypatch: pytest.MonkeyPatch
) -> Iterator[FaultProxy]:
    """A proxy before ``hub``, through which ``client`` goes, with a token that may write."""
    # Between its tries, huggingface_hub waits longer than tests may.
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
    hub.tokens[TOKEN] = "me"
    client.log_in(TOKEN)
    with FaultProxy(hub.address) as running:
        client.use(running.address)
        yield running


@pytest.fixture(scope="session")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small finished merge in four shards. Not to be changed: damage a copy."""
    folder = tmp_path_factory.mktemp("merged")
    merge(small_merge(folder), folder / "out", device="cpu", choice=TWO_LANES)
    return folder / "out"


@pytest.fixture
def target(tmp_path: Path, hub: Hub, small: MergePlan, monkeypatch: pytest.MonkeyPatch) -> Target:
    """A merge of four shards that goes to ``hub``, whose failures are tried again at once."""
    monkeypatch.setattr(Retries, "pause", lambda *_: None)
    return Target(tmp_path, hub, small)

"""Base, adapter and result wherever they may lie: the same bytes as from disk to disk.

In this process every combination; on Ray, whose workers take seconds to start, each place in each
role.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from clusters import running_cluster
from fault_proxy import Exchange, Fault, FaultProxy, pass_on
from hub_client import HubClient
from hub_server import Hub
from models import make_adapter, make_base
from pushes import head
from ray import cloudpickle
from ray._common.utils import get_default_ray_temp_dir
from s3_server import ENVIRONMENT, TOKEN, refusal
from typer.testing import CliRunner

from cluster.cli import app
from merge_core.hub_commit import RECIPE
from merge_core.model_card import CARD
from merge_core.planner import make_plan
from merge_core.stores.location import Access, locate
from merge_core.stores.opening import open_store
from merge_core.stores.s3_client import client_for

BUCKET = "matrix"
NUMBERS = itertools.count()
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
"""huggingface_hub 2.4's own, where it sends a file."""

HF_TOKEN = "hf_that-nobody-may-see"


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """Base and adapter on a disk, in S3 and on a hub, and room for results."""

    folder: Path
    endpoint: str
    hub: Hub
    inputs: dict[str, tuple[str, str]]

    def result(self, kind: str) -> list[str]:
        """OUT, and what goes with it: ``hub and s3`` is a hub with its state in S3."""
        name = f"out-{next(NUMBERS)}"
        places = {"disk": str(self.folder / name), "s3": f"s3://{BUCKET}/{name}"}
        first, _, state = kind.partition(" and ")
        return [f"hf://me/{name}", "--state", places[state]] if state else [places[first]]

    def files(self, out: str) -> dict[str, bytes]:
        """What lies there, but for raymeld's own and the card, which names what it was made of."""
        if out.startswith("hf://"):
            files = head(self.hub.repos[out.removeprefix("hf://")])
            return {n: data for n, data in files.items() if n not in (CARD, RECIPE)}
        store = open_store(locate(out, Access(endpoint_url=self.endpoint)))
        listed = (one.name for one in store.list())
        names = [name for name in listed if not name.startswith(".") and name != CARD]
        return {name: store.get(name) for name in names}

    def run(self, *arguments: str) -> str:
        """What a command that succeeds answers."""
        done = CliRunner().invoke(app, [*arguments, "--endpoint-url", self.endpoint])
        assert done.exit_code == 0, done.output
        return done.stdout

    def merge(
        self, base: str, adapter: str, out: str, address: str, again: str | None = None
    ) -> str:
        """Where the result lies."""
        result = [again] if again is not None else self.result(out)
        how = ["--address", address, "--shard-size", "80KB", "--quiet"]
        if address != "inline":
            how += ["--workers", "2"]
        ends = self.inputs[base][0], self.inputs[adapter][1]
        self.run("merge", *ends, "--out", *result, *how)
        return result[0]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory, s3_address: str) -> Iterator[Places]:
    folder = tmp_path_factory.mktemp("matrix")
    base = make_base(folder / "base", shard="60KB", num_hidden_layers=1)
    adapter = make_adapter(folder / "adapter", base)
    with ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        hub = stack.enter_context(Hub())
        client = HubClient(patch, folder / "hf")
        client.use(hub.address)
        client.log_in(HF_TOKEN)
        hub.tokens[HF_TOKEN] = "me"
        stack.callback(client.close)
        access = Access(endpoint_url=s3_address)
        client_for(access).create_bucket(Bucket=BUCKET)
        for path in (base, adapter):
            files = {each.name: each.read_bytes() for each in path.iterdir()}
            hub.repo(f"org/{path.name}", files)
            for name, data in files.items():
                open_store(locate(f"s3://{BUCKET}/{path.name}", access)).put(name, data)
        yield Places(
            folder=folder,
            endpoint=s3_address,
            hub=hub,
            inputs={
                "disk": (str(base), str(adapter)),
                "s3": (f"s3://{BUCKET}/base", f"s3://{BUCKET}/adapter"),
                "hub": ("hf://org/base@main", "org/adapter"),
            },
        )


@pytest.fixture(scope="module")
def expected(places: Places) -> dict[str, bytes]:
    files = places.files(places.merge("disk", "disk", "disk", "inline"))
    assert len([name for name in files if name.endswith(".safetensors")]) >= 2
    return files


@pytest.fixture(scope="module")
def address(places: Places) -> Iterator[str]:
    """Of a cluster that reaches S3 and the hub."""
    seen = {
        "HF_ENDPOINT": places.hub.address,
        "HF_HUB_OFFLINE": "0",
        "HF_TOKEN": HF_TOKEN,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(places.folder / "hf-of-workers"),
    }
    with running_cluster(**seen, **ENVIRONMENT) as at:
        yield at


@pytest.mark.parametrize(
    ("base", "adapter", "out"),
    [
        *itertools.product(("disk", "s3", "hub"), ("disk", "s3", "hub"), ("disk", "s3")),
        ("disk", "disk", "hub and disk"),
        ("hub", "s3", "hub and s3"),
    ],
)
def test_inline(
    places: Places, expected: dict[str, bytes], base: str, adapter: str, out: str
) -> None:
    assert places.files(places.merge(base, adapter, out, "inline")) == expected


@pytest.mark.parametrize(
    ("base", "adapter", "out"),
    [
        ("disk", "hub", "s3"),
        ("s3", "disk", "disk"),
        ("hub", "s3", "s3"),
        ("s3", "hub", "hub and s3"),
    ],
)
def test_on_ray(
    places: Places,
    expected: dict[str, bytes],
    address: str,
    base: str,
    adapter: str,
    out: str,
) -> None:
    assert places.files(places.merge(base, adapter, out, address)) == expected


def test_with_cache_each_node_has_the_whole_files_that_it_needed(
    places: Places, expected: dict[str, bytes], address: str
) -> None:
    cache, (out,) = places.folder / "hf-of-workers" / "hub", places.result("disk")
    assert not list(cache.glob("models--org--*/snapshots/*/*.safetensors"))
    words = [places.inputs["hub"][0], places.inputs["hub"][1], "--out", out, "--cache", "--quiet"]
    places.run("merge", *words, "--address", address, "--workers", "2", "--shard-size", "80KB")
    assert places.files(out) == expected
    found = {path.name for path in cache.glob("models--org--*/snapshots/*/*.safetensors")}
    assert found == {
        path.name for path in places.folder.glob("[ab]*/*.safetensors") if path.is_file()
    }


def test_a_merge_into_a_merge_has_the_server_copy_what_stays_if_it_does(
    places: Places, address: str
) -> None:
    def no_copies(exchange: Exchange) -> None:
        copied = "x-amz-copy-source" in exchange.seen.headers
        (refusal(501, "NotImplemented") if copied else pass_on)(exchange)

    first = {place: places.merge("disk", "disk", place, "inline") for place in ("disk", "s3")}
    ends = first["s3"], places.inputs["disk"][1], "--shard-size", "80KB"
    notes = json.loads(places.run("plan", *ends, "--out", *places.result("s3"), "--json"))["notes"]
    assert [note.partition(" lie unchanged in ")[2] for note in notes if "unchanged" in note] == [
        f"{first['s3']}: S3 copies them within itself, and they are not uploaded"
    ]
    results, sent = [], []
    with FaultProxy(places.endpoint) as proxy:
        for base, address_of_it, faults in (
            (first["disk"], "inline", []),
            (first["s3"], "inline", []),
            (first["s3"], address, [Fault(no_copies, method="PUT", times=None)]),
        ):
            proxy.faults(*faults)
            proxy.forget()
            (out,) = places.result("s3")
            words = ["merge", base, places.inputs["disk"][1], "--out", out, "--shard-size", "80KB"]
            words += ["--address", address_of_it, "--endpoint-url", proxy.address]
            done = CliRunner().invoke(app, words)
            assert done.exit_code == 0, done.output
            results.append(places.files(out))
            parts = [one for one in proxy.seen("PUT", "partNumber") if one.status == 200]
            sent.append(len([one for one in parts if one.received]))
            assert done.output.count("the server copies nothing within itself") == len(faults)
    assert results[1] == results[2] == results[0]
    assert sent[0] == sent[2] > sent[1] > 0


def test_the_other_commands_know_a_result_in_a_store(places: Places) -> None:
    out = places.merge("hub", "s3", "s3", "inline")
    before = open_store(locate(out, Access(endpoint_url=places.endpoint))).look("config.json")

    assert json.loads(places.run("verify", out, "--level", "numeric", "--json"))["ok"] is True
    assert json.loads(places.run("status", out, "--json"))["state"] == "finished"
    page = places.folder / "report.html"
    places.run("report", out, "--output", str(page), "--spectrum", "1")
    assert "Merged and verified" in page.read_text()
    places.merge("hub", "s3", "s3", "inline", again=out)
    after = open_store(locate(out, Access(endpoint_url=places.endpoint))).look("config.json")
    assert after == before


def test_no_credentials_are_kept_or_said_anywhere(places: Places, address: str) -> None:
    (out,), page = places.result("s3"), places.folder / "shown.html"
    inputs = places.inputs["hub"][0], places.inputs["s3"][1]
    options = ["--address", address, "--workers", "2", "--debug"]
    said = places.run("merge", *inputs, "--out", out, *options)
    said += places.run("plan", *inputs, "--json") + places.run("status", out, "--json")
    places.run("report", out, "--output", str(page))

    access = Access(endpoint_url=places.endpoint)
    store, plan = open_store(locate(out, access)), make_plan(inputs[0], inputs[1:], access=access)
    found = {listed.name: store.get(listed.name) for listed in store.list()}
    found |= {"said": said.encode(), "page": page.read_bytes(), "plan": cloudpickle.dumps(plan)}
    logs = dict(logs_of_ray())
    assert any(Path(name).name.startswith("worker-") for name in logs)
    found |= logs
    assert [name for name, data in found.items() if TOKEN.encode() in data] == []
    assert [name for name, data in found.items() if HF_TOKEN.encode() in data] == []


def logs_of_ray() -> Iterator[tuple[str, bytes]]:
    """Of every cluster of this machine: those of other tests begin and end meanwhile."""
    for path in Path(get_default_ray_temp_dir()).rglob("*"):
        with suppress(FileNotFoundError):
            if path.is_file():
                yield str(path), path.read_bytes()

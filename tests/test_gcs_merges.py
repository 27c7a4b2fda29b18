"""Merges from and to GCS: the same bytes as on a disk, on Ray as well, whoever dies; no secrets."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import kills
import pytest
from clusters import running_cluster
from fault_proxy import Exchange, Fault, FaultProxy
from gcs_server import Gcs
from handmade import Geometry, random_factors, random_tensors, write_adapter, write_base
from network_faults import client, drop_within, heard, kill, lose_answer, say
from ray import cloudpickle
from ray._common.utils import get_default_ray_temp_dir
from s3_server import ENVIRONMENT
from typer.testing import CliRunner

from cluster.cli import app
from merge_core.model_card import CARD
from merge_core.planner import make_plan
from merge_core.stores.gcs_client import login
from merge_core.stores.location import Access, locate
from merge_core.stores.opening import open_store
from merge_core.stores.s3_client import client_for

BUCKET = "merges"
SHARD_BYTES = 12_600_000
"""Two chunks of an upload each, as they are in earnest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """Base and adapter on a disk, in GCS and in an S3, and a cluster; all requests are seen."""

    folder: Path
    gcs: Gcs
    proxy: FaultProxy
    inputs: dict[str, tuple[str, str]]

    def files(self, out: str) -> dict[str, bytes]:
        """What lies there, but for raymeld's own and the card, which names what it was made of."""
        store = open_store(locate(out))
        names = [one.name for one in store.list() if not one.name.startswith(".")]
        return {name: store.get(name) for name in names if name != CARD}

    def words(self, base: str, adapter: str, out: str) -> list[str]:
        ends = self.inputs[base][0], self.inputs[adapter][1]
        return [*ends, "--out", out, "--shard-size", f"{SHARD_BYTES}B", "--device", "cpu"]

    def run(self, *arguments: str) -> str:
        """All that a command that succeeds says."""
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 0, done.output
        return done.output


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory, gcs: Gcs, s3_address: str) -> Iterator[Places]:
    folder = tmp_path_factory.mktemp("gcs-merges")
    geometry = Geometry(hidden=512, inner=256, vocab=9000, layers=8)
    factors = random_factors(geometry.linear, dict.fromkeys(geometry.linear, 2))
    base = write_base(folder / "base", random_tensors(geometry), geometry.config)
    adapter = write_adapter(folder / "adapter", factors, r=2, lora_alpha=4)
    gcs.buckets[BUCKET] = {}
    with ExitStack() as stack:
        proxy = stack.enter_context(FaultProxy(gcs.address))
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        seen = gcs.environment() | ENVIRONMENT | {"GOOGLE_BASE_URL": proxy.address}
        for name, value in (seen | {"AWS_ENDPOINT_URL": s3_address}).items():
            patch.setenv(name, value)
        login.cache_clear()
        client_for(Access()).create_bucket(Bucket=BUCKET)
        for path in (base, adapter):
            for each in path.iterdir():
                for scheme in ("gs", "s3"):
                    open_store(locate(f"{scheme}://{BUCKET}/{path.name}")).put(
                        each.name, each.read_bytes()
                    )
        remote = {s: (f"{s}://{BUCKET}/base", f"{s}://{BUCKET}/adapter") for s in ("gs", "s3")}
        disk = {"disk": (str(base), str(adapter))}
        yield Places(folder=folder, gcs=gcs, proxy=proxy, inputs=disk | remote)


@pytest.fixture(scope="module")
def expected(places: Places) -> dict[str, bytes]:
    out = str(places.folder / "out")
    places.run("merge", *places.words("disk", "disk", out), "--address", "inline")
    files = places.files(out)
    assert len([name for name in files if name.endswith(".safetensors")]) == 4
    return files


@pytest.fixture(scope="module")
def address(places: Places) -> Iterator[str]:
    """Of a cluster that reaches GCS and S3."""
    with running_cluster(cpus=2) as at:
        yield at


def assert_done(places: Places, out: str, expected: dict[str, bytes]) -> None:
    """All is there as on a disk, and no upload and no part is left."""
    assert places.files(out) == expected
    assert places.gcs.uploads_of(BUCKET) == {}
    assert not [key for key in places.gcs.buckets[BUCKET] if "/parts/" in key]


def assert_whole(out: str, expected: dict[str, bytes]) -> None:
    """Whatever has a final key, before the merge is done."""
    store = open_store(locate(out))
    there = {one.name for one in store.list() if re.match("model-|config", one.name)}
    assert {name: store.get(name) for name in there} == {name: expected[name] for name in there}
    assert "config.json" not in there


@pytest.mark.parametrize(
    ("base", "adapter", "out"),
    [("gs", "gs", "gs"), ("disk", "gs", "gs"), ("gs", "disk", "disk"), ("s3", "gs", "gs")],
)
def test_inline(
    places: Places, expected: dict[str, bytes], base: str, adapter: str, out: str
) -> None:
    name = f"inline-{base}-{adapter}"
    where = f"gs://{BUCKET}/{name}" if out == "gs" else str(places.folder / name)
    places.run("merge", *places.words(base, adapter, where), "--address", "inline")
    assert_done(places, where, expected)


def test_a_public_model_is_merged_without_credentials(
    places: Places, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GOOGLE_APPLICATION_CREDENTIALS")
    monkeypatch.setattr(places.gcs, "public", {BUCKET})
    out = str(places.folder / "public")
    places.proxy.forget()
    places.run("merge", *places.words("gs", "gs", out), "--address", "inline", "--anonymous")
    assert places.files(out) == expected
    assert not [one for one in places.proxy.seen() if "authorization" in one.headers]


def test_an_endpoint_of_s3_is_refused_with_gcs(places: Places) -> None:
    words = places.words("gs", "gs", str(places.folder / "refused"))
    refused = CliRunner().invoke(app, ["merge", *words, "--endpoint-url", "http://127.0.0.1:1"])
    assert (refused.exit_code, "GOOGLE_BASE_URL" in refused.output) == (2, True), refused.output


def test_through_a_bad_connection_a_merge_succeeds_or_fails_clearly_and_can_be_finished(
    places: Places, expected: dict[str, bytes]
) -> None:
    out = f"gs://{BUCKET}/faulty"
    words = ["merge", *places.words("gs", "gs", out), "--address", "inline"]
    passing = [
        Fault(drop_within(1000), method="GET", path="/base%2Fmodel", skip=2),
        Fault(say(503), method="PUT", path="faulty%2F.*partNumber=1"),
        Fault(lose_answer, method="POST", path="faulty%2F.*uploadId"),
        Fault(lose_answer, method="PUT", path="faulty%2Fmodel%2D00001"),
        Fault(say(429), method="GET", path="[?]uploads"),
    ]
    places.proxy.forget()
    places.proxy.faults(
        *passing, Fault(say(403), method="PUT", path="parts.*model%2D00003", times=None)
    )
    failed = CliRunner().invoke(app, words)
    assert len([one for one in places.proxy.seen() if one.faulty]) > len(passing)
    assert (failed.exit_code, "access is denied" in failed.output) == (1, True), failed.output
    assert_whole(out, expected)
    places.proxy.faults()
    places.run(*words)
    assert_done(places, out, expected)


def test_the_other_commands_know_a_result_in_gcs(
    places: Places, expected: dict[str, bytes]
) -> None:
    out, page = f"gs://{BUCKET}/known", places.folder / "report.html"
    places.run("merge", *places.words("gs", "gs", out), "--address", "inline")
    assert json.loads(places.run("verify", out, "--level", "numeric", "--json", "--quiet"))["ok"]
    assert json.loads(places.run("status", out, "--json"))["state"] == "finished"
    places.run("report", out, "--output", str(page))
    assert "Merged and verified" in page.read_text()


def test_workers_that_die_in_an_upload_leave_nothing_of_it(
    places: Places, expected: dict[str, bytes], address: str
) -> None:
    def half(exchange: Exchange) -> None:
        exchange.half_asked()

    out = f"gs://{BUCKET}/killed"
    part = r"/killed%2F.*parts.*model%2D{:05}.*[?].*"
    deaths = [
        Fault(kill(client, half), method="PUT", path=part.format(1) + "partNumber=1"),
        Fault(kill(client, heard), method="PUT", path=part.format(2) + "partNumber=2"),
        Fault(kill(client, heard), method="POST", path=part.format(3) + "uploads"),
        Fault(kill(client, heard), method="POST", path=part.format(2) + "uploadId"),
    ]
    places.proxy.faults(*deaths)
    places.proxy.forget()
    said = places.run(
        "merge", *places.words("gs", "gs", out), "--address", address, "--workers", "2"
    )
    assert len([one for one in places.proxy.seen() if one.faulty]) == len(deaths), said
    assert said.count("after failure") == 4, said
    assert_done(places, out, expected)


def test_a_merge_that_dies_in_an_upload_leaves_what_the_same_command_finishes(
    places: Places, expected: dict[str, bytes]
) -> None:
    out = f"gs://{BUCKET}/died"
    others = f"gs://{BUCKET}/died2/.raymeld/parts/model/1-a"
    other = places.gcs.begin(BUCKET, others.partition(f"{BUCKET}/")[2])
    words = ["merge", *places.words("gs", "gs", out), "--address", "inline"]
    for target in (r"/died%2F.*model%2D00002.*partNumber=2", r"/died%2F.*model%2D00003.*uploadId"):
        places.proxy.faults(Fault(kill(client, heard), path=target))
        died = subprocess.run(kills.command([], *words), capture_output=True, text=True)
        assert died.returncode == -9, died.stderr
        assert_whole(out, expected)
    assert len(places.gcs.uploads_of(BUCKET)) == 2
    places.proxy.faults()
    places.run(*words)
    assert list(places.gcs.uploads_of(BUCKET)) == [other]
    del places.gcs.uploads[other]
    assert_done(places, out, expected)


def test_no_credentials_are_kept_or_said_anywhere(places: Places, address: str) -> None:
    out, page = f"gs://{BUCKET}/secret", places.folder / "secret.html"
    words = places.words("gs", "gs", out)
    said = places.run("merge", *words, "--address", address, "--workers", "2", "--debug")
    said += places.run("plan", *words[:2], "--json") + places.run("status", out, "--json")
    places.run("report", out, "--output", str(page))
    token = places.gcs.tokens.copy()
    places.gcs.tokens.clear()
    failed = CliRunner().invoke(app, ["verify", out, "--debug"])
    places.gcs.tokens |= token
    assert failed.exit_code == 1

    found = {key: stored.data for key, stored in places.gcs.buckets[BUCKET].items()}
    plan = make_plan(words[0], [words[1]])
    found |= {"said": said.encode(), "page": page.read_bytes(), "plan": cloudpickle.dumps(plan)}
    found["failed"] = failed.output.encode() + str(failed.exception).encode()
    logs = dict(logs_of_ray())
    assert any(Path(name).name.startswith("worker-") for name in logs)
    found |= logs
    key = json.loads(places.gcs.key_file.read_text())["private_key"].splitlines()[3]
    assert [name for name, data in found.items() if b"ya29.that-nobody" in data] == []
    assert [name for name, data in found.items() if key.encode() in data] == []


def logs_of_ray() -> Iterator[tuple[str, bytes]]:
    """Of every cluster of this machine: those of other tests begin and end meanwhile."""
    for path in Path(get_default_ray_temp_dir()).rglob("*"):
        with suppress(FileNotFoundError):
            if path.is_file():
                yield str(path), path.read_bytes()

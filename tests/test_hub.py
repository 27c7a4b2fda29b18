"""Reading from the hub: what is asked for, what comes, and what is said when it does not."""

from __future__ import annotations

import json
import logging
import mmap
import pickle
import random
import traceback
from pathlib import Path

import huggingface_hub
import pytest
from fault_proxy import Fault, FaultProxy
from hub_client import QUICK, HubClient
from hub_repos import Repo, git_oid, sha256
from hub_server import Hub

from merge_core.errors import AbsentError, StorageError
from merge_core.layout import header_length, lay_out
from merge_core.stores.hub import HubStore, sha256_of
from merge_core.stores.location import Access, locate
from merge_core.stores.store import Listed

SIZE = 300_000
WEIGHTS = random.Random(1).randbytes(SIZE)
CONFIG = b'{"model_type": "qwen2"}'
FILES = {"config.json": CONFIG, "model.safetensors": WEIGHTS, "a b/c#1.txt": b"odd", "z/y/x": b""}


@pytest.fixture
def repo(hub: Hub, client: HubClient) -> Repo:
    return hub.repo("org/base", FILES)


@pytest.fixture
def proxy(hub: Hub, client: HubClient, repo: Repo) -> FaultProxy:
    with FaultProxy(hub.address) as running:
        client.use(running.address)
        yield running


def store(text: str = "hf://org/base", *, cache: bool = False) -> HubStore:
    return HubStore(locate(text, Access(cache=cache)), retries=QUICK)


def read(opened: HubStore, name: str, offset: int, nbytes: int) -> bytes:
    reader = opened.open(opened.look(name))
    buffer = memoryview(mmap.mmap(-1, nbytes + 8192))
    got = bytes(reader.read_into(buffer, offset, nbytes))
    assert got == bytes(reader.read(offset, nbytes))
    reader.close()
    return got


def test_signed_addresses_are_in_no_log(repo: Repo, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    read(store(), "model.safetensors", 1, 10)
    assert "signature" not in caplog.text


def test_the_files_of_a_model_and_of_a_folder_in_it(repo: Repo, hub: Hub) -> None:
    hub.page = 1
    listed = list(store().list())
    assert {one.name: one.size for one in listed} == {n: len(d) for n, d in FILES.items()}
    changed = 1707048000.0
    assert {one.modified for one in listed} == {changed}
    assert [one.name for one in store().list("z")] == ["z/y/x"]
    folder = store("hf://org/base/z")
    assert list(folder.list()) == [Listed(name="y/x", size=0, modified=changed)]
    assert folder.get("y/x") == b""
    assert list(store("hf://org/base/none").list()) == []


@pytest.mark.parametrize("name", FILES)
def test_small_files_are_got_whole(repo: Repo, name: str) -> None:
    assert store().get(name) == FILES[name]


def test_a_pin_has_the_commit_and_the_digest(repo: Repo) -> None:
    commit = repo.refs["main"]
    weights, config = store().look("model.safetensors"), store().look("config.json")
    assert weights.pin == f"{commit} sha256:{sha256(WEIGHTS)}"
    assert config.pin == f"{commit} git:{git_oid(CONFIG)}"
    assert (sha256_of(weights), sha256_of(config)) == (sha256(WEIGHTS), None)
    assert (weights.size, config.size) == (SIZE, len(CONFIG))


def test_a_branch_that_moves_on_changes_nothing(repo: Repo) -> None:
    opened = store()
    before, first = opened.look("model.safetensors"), repo.refs["main"]
    second = repo.commit({"model.safetensors": bytes(SIZE), "config.json": b"{}"})
    assert opened.get("config.json") == CONFIG
    assert str(opened.pinned) == f"hf://org/base@{first}"
    for other in (opened, store(), HubStore(opened.pinned)):  # as a worker opens what it was sent
        assert bytes(other.open(before).read(5, 9)) == WEIGHTS[5:14]
    assert HubStore(opened.pinned).look("model.safetensors") == before
    assert store().look("model.safetensors").pin.startswith(second)
    assert read(store(), "model.safetensors", 5, 9) == bytes(9)


@pytest.mark.parametrize("revision", ["v1", "refs/pr/7", "0" * 7])
def test_a_revision_is_a_branch_a_tag_or_a_commit(repo: Repo, revision: str) -> None:
    repo.refs[revision] = repo.refs["main"]
    repo.commit({"config.json": b"{}"})
    assert store(f"hf://org/base@{revision}").get("config.json") == CONFIG
    assert store(f"hf://org/base@{repo.refs[revision]}").get("config.json") == CONFIG


def test_ranges_are_what_is_asked_for_and_nothing_else_comes(proxy: FaultProxy) -> None:
    opened = store()
    opened.look("model.safetensors")
    proxy.forget()
    reader = opened.open(opened.look("model.safetensors"))
    buffer = memoryview(mmap.mmap(-1, SIZE + 8192))
    for offset, nbytes in [(100_001, 3), (0, 1000), (200_000, 100_000), (7, 0)]:
        got = bytes(reader.read_into(buffer, offset, nbytes))
        assert got == WEIGHTS[offset : offset + nbytes]
    # The hub is asked where the file lies once; the signed address serves all of it.
    assert proxy.tally("GET", "/resolve/").requests == 1
    cdn = proxy.tally("GET", "^/cdn/")
    assert (cdn.requests, cdn.sent) == (3, 101_003)


def test_a_header_costs_one_request_of_100_kb(proxy: FaultProxy, repo: Repo) -> None:
    opened = store()
    reader = opened.open(opened.look("model.safetensors"))
    proxy.forget()
    assert bytes(reader.read(0, 8)) == WEIGHTS[:8]
    assert bytes(reader.read(8, 60_000)) == WEIGHTS[8:60_008]
    assert (proxy.tally("GET", "^/cdn/").requests, proxy.tally().sent) == (1, 100_000)
    assert bytes(reader.read(8, 149_992)) == WEIGHTS[8:150_000]  # the rest of a long one
    assert (proxy.tally("GET", "^/cdn/").requests, proxy.tally().sent) == (2, 150_000)


def test_opening_every_header_of_a_checkpoint_reads_100_kb_a_file(
    proxy: FaultProxy, hub: Hub
) -> None:
    layout = lay_out([(f"layer.{n}", "BF16", (400, 1000)) for n in range(3)])
    file = layout.header + bytes(layout.size - len(layout.header))
    names = [f"model-{n}.safetensors" for n in range(3)]
    hub.repo("org/three", {**dict.fromkeys(names, file), "config.json": CONFIG})
    opened = store("hf://org/three")
    opened.get("config.json")
    for name in names:
        reader = opened.open(opened.look(name))
        length = header_length(bytes(reader.read(0, 8)), len(file), name)
        assert bytes(reader.read(8, length)) == layout.header[8:]
        reader.close()
    assert proxy.tally("GET", "^/cdn/").sent == 3 * 100_000
    assert proxy.tally().requests == 1 + 1 + 1 + 3 * 2  # commit, tree, config; where, and a range
    assert proxy.tally().sent < 310_000


def test_what_is_in_the_cache_is_read_there(
    proxy: FaultProxy, client: HubClient, repo: Repo
) -> None:
    huggingface_hub.hf_hub_download("org/base", "model.safetensors")
    proxy.forget()
    assert read(store(), "model.safetensors", 10, 290_000) == WEIGHTS[10:290_010]
    assert proxy.tally("GET", "resolve|cdn").requests == 0
    repo.commit({"model.safetensors": bytes(SIZE)})  # of which the cache has nothing
    assert read(store(), "model.safetensors", 10, 20) == bytes(20)


def test_a_damaged_cache_is_named(client: HubClient, repo: Repo) -> None:
    path = Path(huggingface_hub.hf_hub_download("org/base", "model.safetensors"))
    path.resolve().write_bytes(b"short")
    with pytest.raises(StorageError, match=r"model.safetensors: has not the 300000 bytes .*cache"):
        store().open(store().look("model.safetensors"))


def test_with_cache_whole_files_are_fetched_and_only_those_opened(
    client: HubClient, repo: Repo
) -> None:
    opened = store(cache=True)
    assert opened.fetch(opened.look("model.safetensors")).read_bytes() == WEIGHTS
    assert read(opened, "model.safetensors", 10, 20) == WEIGHTS[10:30]
    assert opened.get("config.json") == CONFIG
    cached = {path.name for path in client.cache.rglob("snapshots/*/**/*") if path.is_file()}
    assert cached == {"model.safetensors", "config.json"}


def test_offline_the_cached_snapshot_is_read_without_a_request(
    proxy: FaultProxy, client: HubClient
) -> None:
    huggingface_hub.snapshot_download("org/base", allow_patterns=["*.json", "*.safetensors", "z/*"])
    online = {name: store().look(name) for name in ("model.safetensors", "config.json")}
    client.go_offline()
    proxy.forget()
    opened = store()
    assert {one.name for one in opened.list()} == {"model.safetensors", "config.json", "z/y/x"}
    assert read(opened, "model.safetensors", 10, 20) == WEIGHTS[10:30]
    assert opened.get("config.json") == CONFIG
    assert {name: opened.look(name) for name in online} == online  # the same pins: a merge goes on
    assert proxy.tally().requests == 0
    with pytest.raises(AbsentError, match="HF_HUB_OFFLINE"):
        opened.look("a b/c#1.txt")


@pytest.mark.parametrize("text", ["hf://org/base", "hf://org/base@v9", "hf://org/base@" + "a" * 40])
def test_offline_what_is_not_cached_is_said(client: HubClient, text: str) -> None:
    client.go_offline()
    with pytest.raises(AbsentError, match=r"not in the cache \(.*\), and HF_HUB_OFFLINE") as raised:
        store(text).look("config.json")
    assert "`hf download org/base`" in str(raised.value)


def test_offline_a_commit_that_was_fetched_without_its_branch_is_named(
    client: HubClient, repo: Repo
) -> None:
    store(cache=True).get("config.json")
    client.go_offline()
    commit = repo.refs["main"]
    with pytest.raises(AbsentError, match=f"of commits, {commit} can be named"):
        store().get("config.json")
    assert store(f"hf://org/base@{commit}").get("config.json") == CONFIG


def test_offline_a_file_that_was_pinned_and_is_not_cached_is_said(
    client: HubClient, repo: Repo
) -> None:
    pinned = store().look("model.safetensors")
    client.go_offline()
    with pytest.raises(AbsentError, match="HF_HUB_OFFLINE forbids"):
        store().open(pinned).read(0, 8)


def test_what_is_missing_is_named(repo: Repo) -> None:
    with pytest.raises(AbsentError, match="org/none@main: the hub has no such model"):
        store("hf://org/none").look("config.json")
    with pytest.raises(AbsentError, match=r"no branch, tag or commit 'v9'.*/refs"):
        list(store("hf://org/base@v9").list())
    with pytest.raises(AbsentError, match="no branch, tag or commit"):
        list(store("hf://org/base@" + "a" * 40 + "/folder").list())
    with pytest.raises(AbsentError, match=r"/nothing.json: the model has no such file"):
        store().get("nothing.json")


def test_a_private_model_needs_a_token(hub: Hub, client: HubClient) -> None:
    hub.repo("org/secret", FILES, private=True)
    hub.tokens["hf_right"] = "me"
    with pytest.raises(AbsentError, match=r"without a token.*private, `hf auth login`.*HF_TOKEN"):
        store("hf://org/secret").look("config.json")
    client.log_in("hf_right")
    assert read(store("hf://org/secret"), "model.safetensors", 3, 4) == WEIGHTS[3:7]


def test_a_gated_model_needs_its_terms_accepted(hub: Hub, client: HubClient) -> None:
    repo = hub.repo("org/gated", FILES, granted=set())
    hub.tokens["hf_right"] = "me"
    for _ in range(2):
        opened = store("hf://org/gated")
        wanted = f"gated.*Accept its terms at {hub.address}/org/gated"
        with pytest.raises(StorageError, match=wanted):
            opened.get("config.json")
        with pytest.raises(StorageError, match=wanted):
            opened.open(opened.look("model.safetensors")).read(0, 8)
        client.log_in("hf_right")
    repo.granted = {"hf_right"}
    assert store("hf://org/gated").get("config.json") == CONFIG


def test_a_token_that_is_wrong_is_said_and_never_shown(
    hub: Hub, client: HubClient, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    hub.repo("org/secret", FILES, private=True)
    client.log_in("hf_wrongsecret")
    with pytest.raises(StorageError, match=r"401 \(Invalid cred.*Renew the token") as raised:
        store("hf://org/secret").look("config.json")
    hub.tokens["hf_wrongsecret"] = "me"
    opened = store("hf://org/secret")
    assert opened.get("config.json") == CONFIG
    reader = opened.open(opened.look("model.safetensors"))
    reader.read(0, 8)
    error = raised.value
    shown = [str(error), repr(error), *traceback.format_exception(error), caplog.text]
    shown += [repr(pickle.dumps(error)), repr(opened), repr(reader), str(vars(error))]
    assert not [text for text in shown if "wrongsecret" in text]
    assert error.__cause__ is None


def test_the_hub_is_not_written_to(repo: Repo) -> None:
    with pytest.raises(
        StorageError, match=r"hf://org/base: .*in one commit.*Merge onto it with --state"
    ):
        store().put("config.json", json.dumps({}).encode())
    with pytest.raises(StorageError, match="in one commit"):
        store().start("model.safetensors", 7, attempt="1")


def test_a_server_that_is_gone_is_named(client: HubClient, repo: Repo) -> None:
    with FaultProxy(
        "http://127.0.0.1:9", Fault(lambda exchange: exchange.hang_up(), times=None)
    ) as p:
        client.use(p.address)
        with pytest.raises(StorageError, match=r"org/base@main: no answer .*3 times in a row"):
            store().look("config.json")

"""Pushing a finished merge to the hub: all of it in one commit, and only where it may."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from fault_proxy import FaultProxy
from hub_client import QUICK, HubClient
from hub_repos import Xet, sha256
from hub_server import Hub
from pushes import assert_pushed, files_of, head, push

from merge_core.errors import InputError, RaymeldError
from merge_core.stores.hub import HubStore
from merge_core.stores.hub_push import HubPush, Sent
from merge_core.stores.location import locate

pytestmark = [
    pytest.mark.usefixtures("before_hub"),
    # huggingface_hub 2.4's own, where it sends a file:
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),
]


def test_a_merge_is_pushed_in_one_commit_to_a_private_repository(
    merged: Path, hub: Hub, before_hub: FaultProxy
) -> None:
    said: list[str] = []
    url = push(merged, said=said)
    repo = hub.repos["me/merge"]
    assert_pushed(repo, merged)
    assert repo.private
    assert url == f"{before_hub.address}/me/merge/commit/{repo.refs['main']}"
    assert said == [
        *(f"the hub holds model-0000{n}-of-00004.safetensors (0.00 GB)" for n in range(1, 5)),
        "the model card names no base on the hub: BASE was none",
    ]
    assert before_hub.tally("POST", "/commit/").requests == 1
    # What was pushed can be read again, and is what was merged.
    store = HubStore(locate("hf://me/merge"), retries=QUICK)
    assert {one.name for one in store.list()} > set(files_of(merged))
    assert store.get("config.json") == (merged / "config.json").read_bytes()


def test_the_same_push_again_sends_and_commits_nothing(
    merged: Path, hub: Hub, before_hub: FaultProxy
) -> None:
    url = push(merged)
    before_hub.forget()
    said: list[str] = []
    assert push(merged, said=said) == url
    assert said[-1] == "me/merge has all of it already"
    assert before_hub.tally("PUT").requests == before_hub.tally("POST", "/commit/").requests == 0
    assert len(hub.repos["me/merge"].commits) == 2


def test_a_branch_can_be_pushed_to(merged: Path, hub: Hub) -> None:
    repo = hub.repo("me/merge", {"README.md": b"mine"}, private=True)
    first = repo.refs["trial"] = repo.refs["main"]
    push(merged, "me/merge@trial")
    assert repo.refs["main"] == first != repo.refs["trial"]
    with pytest.raises(InputError, match="no branch, tag or commit 'none'"):
        push(merged, "hf://me/merge@none")


def test_what_may_not_be_pushed_to_is_refused(merged: Path, hub: Hub) -> None:
    hub.repo("me/other", {"model.safetensors": b"precious"}, private=True)
    with pytest.raises(InputError, match=r"hf://me/other@main: .*else already: model.safe"):
        push(merged, "me/other")
    public = hub.repo("me/public", {"README.md": b"hello"})
    with pytest.raises(InputError, match="everybody can see it"):
        push(merged, "me/public")
    assert [len(hub.repos[name].commits) for name in ("me/other", "me/public")] == [1, 1]
    push(merged, "me/public", private=False)
    assert_pushed(public, merged)


def unfinish_config(out: Path) -> None:
    (out / "config.json").unlink()


def unfinish_shard(out: Path) -> None:
    (out / "model-00002-of-00004.safetensors").unlink()


def cut_shard(out: Path) -> None:
    path = out / "model-00002-of-00004.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def change_tokenizer(out: Path) -> None:
    (out / "tokenizer.json").write_bytes(b"{}")


def make_foreign(out: Path) -> None:
    shutil.rmtree(out / ".raymeld")


@pytest.mark.parametrize(
    ("spoil", "wanted"),
    [
        (unfinish_config, r"is an unfinished merge. Give the same merge command again"),
        (unfinish_shard, r"is an unfinished merge: model-00002-of-00004.safetensors missing"),
        (cut_shard, r"is an unfinished merge: model-00002-of-00004.safetensors missing"),
        (change_tokenizer, r"tokenizer.json changed since the merge. Merge again"),
        (make_foreign, "is no merge of raymeld's"),
    ],
)
def test_what_is_no_finished_merge_is_refused(
    merged: Path,
    hub: Hub,
    tmp_path: Path,
    spoil: Callable[[Path], None],
    wanted: str,
) -> None:
    out = shutil.copytree(merged, tmp_path / "copy")
    spoil(out)
    with pytest.raises(InputError, match=wanted):
        push(out)
    assert hub.repos == {}


def test_a_freed_shard_is_committed_by_its_sha256(
    hub: Hub, before_hub: FaultProxy, tmp_path: Path
) -> None:
    """As a merge does that pushes each shard as it is finished, and is killed in between."""
    hub.cas = None
    data = random.Random(1).randbytes(5000)
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    first = HubPush.begin("me/merge", retries=QUICK)
    sent = first.send(path, path.name)
    path.unlink()
    assert sent == Sent(name=path.name, size=5000, sha256=sha256(data))
    absent = Sent(name="other.safetensors", size=4, sha256=sha256(b"none"))

    again = HubPush.begin("me/merge", retries=QUICK)
    assert again.missing([sent, absent]) == [absent]
    again.commit([sent], {"config.json": b"{}"}, "A merge")
    assert head(hub.repos["me/merge"]) == {path.name: data, "config.json": b"{}"}
    with pytest.raises(RaymeldError, match="LFS pointer pointed to a file that does not exist"):
        HubPush.begin("me/merge", retries=QUICK).commit([absent], {}, "Nothing")


def test_shards_go_through_xet_where_the_hub_has_it(
    client: HubClient, merged: Path, hub: Hub, before_hub: FaultProxy
) -> None:
    client.use_xet()
    push(merged)
    files = head(hub.repos["me/merge"])
    for path in merged.glob("*.safetensors"):
        data = path.read_bytes()
        assert files[path.name] == Xet(oid=sha256(data), size=len(data))
    assert before_hub.tally("PUT").requests == 0
    assert any((hub.cas or merged).rglob("*"))


def test_without_a_token_a_push_says_how_to_get_one(
    merged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(
        InputError, match=r"no token, .*`hf auth login`, or put a token into HF_TOKEN"
    ):
        push(merged)


def test_weights_that_changed_since_they_were_verified_are_not_sent(
    merged: Path, hub: Hub, before_hub: FaultProxy, tmp_path: Path
) -> None:
    out = shutil.copytree(merged, tmp_path / "altered")
    weights = sorted(out.glob("*.safetensors"))[1]
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)

    with pytest.raises(InputError, match=f"{weights.name} changed since the merge"):
        push(out)

    assert before_hub.tally("POST", "/commit/").requests == 0

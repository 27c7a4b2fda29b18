"""A merge whose OUT is a model on the hub: weights go there as they are done, then one commit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fault_proxy import Exchange, Fault, FaultProxy, pass_on
from hub_repos import sha256
from hub_target import SHARDS, Target
from network_faults import drop, lose_answer
from pushes import assert_pushed, files_of, head

from merge_core.errors import InputError, StorageError
from merge_core.factors import seal
from merge_core.hub_commit import commit_merge
from merge_core.output import RECEIPTS, is_finished
from merge_core.stores.hub_out import SENT
from merge_core.stores.opening import open_hub_out
from merge_core.verdict import conclude

pytestmark = [
    pytest.mark.usefixtures("before_hub"),
    # huggingface_hub 2.4's own, where it sends a file:
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),
]


def assert_merged(target: Target, merged: Path) -> None:
    """The model is what the same merge on a disk is, in one commit."""
    assert_pushed(target.hub.repos["me/merge"], merged)
    assert target.waiting() == []


def test_it_is_what_the_merge_on_a_disk_is_in_one_commit(
    target: Target, merged: Path, before_hub: FaultProxy
) -> None:
    result = target.merge()

    assert_merged(target, merged)
    repo = target.hub.repos["me/merge"]
    assert repo.private
    assert result.url == f"{before_hub.address}/me/merge/commit/{repo.refs['main']}"
    assert before_hub.tally("POST", "/commit/").requests == 1
    assert result.verified is not None
    assert result.verified.level == "digest"
    assert set(files_of(target.state)) == set(files_of(merged)) - set(SHARDS)
    assert not (target.state / RECEIPTS).exists()


@pytest.mark.parametrize("change", [{"size": 1}, {"sha256": "0" * 64}], ids=["size", "content"])
def test_it_is_finished_as_long_as_its_branch_holds_what_was_planned_and_sent(
    target: Target, change: dict[str, Any]
) -> None:
    target.merge()
    plan, out = seal(target.plan), open_hub_out(target.out)
    assert is_finished(target.out, plan)

    other = replace(out.sent(SHARDS[1]), **change)
    out.put(f"{SENT}/{SHARDS[1]}.json", other.to_json())
    assert not is_finished(target.out, plan)
    out.delete(SHARDS[1])
    assert not is_finished(target.out, plan)


def test_nothing_is_seen_before_the_commit_and_one_file_waits_at_a_time(
    target: Target, before_hub: FaultProxy
) -> None:
    seen: list[tuple[int, int]] = []

    def look(exchange: Exchange) -> None:
        seen.append((len(head(target.hub.repos["me/merge"])), len(target.waiting())))
        pass_on(exchange)

    before_hub.faults(Fault(look, method="PUT", times=None))
    target.merge()

    assert seen == [(0, 1)] * 4


def test_a_branch_can_be_merged_onto(target: Target, merged: Path) -> None:
    repo = target.hub.repo("me/merge", {"README.md": b"mine"}, private=True)
    first = repo.refs["trial"] = repo.refs["main"]
    target.out = replace(target.out, revision="trial")
    target.merge()
    assert repo.refs["main"] == first
    assert repo.commits[repo.refs["trial"]][SHARDS[0]] == (merged / SHARDS[0]).read_bytes()
    target.out = replace(target.out, revision="none")
    with pytest.raises(InputError, match="no branch, tag or commit 'none'"):
        target.merge()


def test_the_same_merge_again_does_nothing(target: Target, before_hub: FaultProxy) -> None:
    url = target.merge().url
    before_hub.forget()

    again = target.merge()

    assert (again.receipts, again.url) == ((), url)
    assert before_hub.tally("PUT").requests == before_hub.tally("POST").requests == 0


def test_a_model_that_has_lost_it_is_no_finished_merge(target: Target, merged: Path) -> None:
    target.merge()
    repo = target.hub.repos["me/merge"]
    repo.commit({SHARDS[0]: b"another"})
    with pytest.raises(InputError, match="but its files are missing or changed"):
        target.merge()
    with pytest.raises(InputError, match="somebody else has committed weights since"):
        target.merge(overwrite=True)
    assert head(repo)[SHARDS[0]] == b"another"
    repo.commit({SHARDS[0]: (merged / SHARDS[0]).read_bytes()})
    assert target.merge().receipts == ()
    assert_pushed(repo, merged, commits=4)


def test_what_was_sent_before_it_was_stopped_is_not_sent_again(
    target: Target, merged: Path, before_hub: FaultProxy
) -> None:
    before_hub.faults(Fault(drop, method="PUT", skip=2, times=None))
    with pytest.raises(StorageError, match=r"model-00003-of-00004.safetensors: .*in a row"):
        target.merge()
    assert head(target.hub.repos["me/merge"]) == {}
    assert target.waiting() == []
    before_hub.faults()
    before_hub.forget()

    assert target.merge().resumed == 2

    assert before_hub.tally("PUT").requests == 2
    assert_merged(target, merged)


def test_what_the_hub_has_lost_is_merged_again(
    target: Target, merged: Path, before_hub: FaultProxy
) -> None:
    before_hub.faults(Fault(drop, path="/commit/", times=None))
    with pytest.raises(StorageError):
        target.merge()
    lost = sha256((merged / SHARDS[1]).read_bytes())
    del target.hub.objects[lost]
    before_hub.faults()

    assert target.merge().resumed == 3

    assert_merged(target, merged)


def test_what_the_state_has_lost_is_merged_again_but_not_sent(
    target: Target, merged: Path, before_hub: FaultProxy
) -> None:
    before_hub.faults(Fault(drop, path="/commit/", times=None))
    with pytest.raises(StorageError):
        target.merge()
    (target.state / ".raymeld" / "sent" / f"{SHARDS[0]}.json").write_text("{}")
    (target.state / ".raymeld" / "sent" / f"{SHARDS[1]}.json").unlink()
    before_hub.faults()
    before_hub.forget()

    assert target.merge().resumed == 2

    assert_merged(target, merged)
    assert before_hub.tally("PUT").requests == 0


def test_what_the_hub_loses_before_the_commit_is_said(
    target: Target, merged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lose(*arguments: Any) -> None:
        del target.hub.objects[sha256((merged / SHARDS[1]).read_bytes())]
        conclude(*arguments)

    monkeypatch.setattr("merge_core.merge.conclude", lose)
    with pytest.raises(StorageError, match=r"the hub does not hold model-00002-of-00004.* any"):
        target.merge()
    assert head(target.hub.repos["me/merge"]) == {}


def test_a_stale_parent_is_said_and_the_same_merge_again_ends(
    target: Target, before_hub: FaultProxy
) -> None:
    def meanwhile(exchange: Exchange) -> None:
        target.hub.repos["me/merge"].commit({"notes.md": b"by another"})
        pass_on(exchange)

    before_hub.faults(Fault(meanwhile, path="/commit/"))
    with pytest.raises(StorageError, match="somebody else has committed meanwhile"):
        target.merge()
    assert head(target.hub.repos["me/merge"]) == {"notes.md": b"by another"}
    before_hub.forget()

    assert target.merge().resumed == 4

    assert before_hub.tally("PUT").requests == 0
    assert {"notes.md", *SHARDS} < set(head(target.hub.repos["me/merge"]))


def test_somebody_elses_model_is_left_alone_though_the_merge_began(
    target: Target, before_hub: FaultProxy
) -> None:
    def meanwhile(exchange: Exchange) -> None:
        target.hub.repos["me/merge"].commit({"model.safetensors": b"precious"})
        pass_on(exchange)

    before_hub.faults(Fault(meanwhile, path="/commit/"))
    with pytest.raises(StorageError, match="somebody else has committed meanwhile"):
        target.merge()
    with pytest.raises(InputError, match=r"something else already: model.safetensors"):
        target.merge()
    assert head(target.hub.repos["me/merge"]) == {"model.safetensors": b"precious"}


def test_a_commit_whose_answer_is_lost_is_not_made_twice(
    target: Target, merged: Path, before_hub: FaultProxy
) -> None:
    before_hub.faults(Fault(lose_answer, path="/commit/"))
    target.merge()
    assert_merged(target, merged)
    assert before_hub.tally("POST", "/commit/").requests == 1


def test_a_merge_that_dies_right_after_its_commit_finds_it(
    target: Target, merged: Path, before_hub: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*arguments: Any) -> str:
        commit_merge(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("merge_core.hub_commit.commit_merge", die)
        with pytest.raises(KeyboardInterrupt):
            target.merge()
    assert not (target.state / "config.json").exists()
    before_hub.forget()
    result = target.merge()

    assert result.resumed == 4
    assert_merged(target, merged)
    assert before_hub.tally("POST", "/commit/").requests == 0
    assert result.url is not None
    assert result.url.endswith(target.hub.repos["me/merge"].refs["main"])

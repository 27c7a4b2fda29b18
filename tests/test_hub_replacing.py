"""A model on the hub that holds a merge already is replaced where that is asked for alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fault_proxy import Fault, FaultProxy
from handmade import TWO_LANES, small_merge
from hub_repos import Repo
from hub_server import Hub
from hub_target import SHARDS, Target
from network_faults import drop
from pushes import assert_pushed, head, push

from merge_core.destination import check_destination, notes_on
from merge_core.errors import InputError, StorageError
from merge_core.merge import merge
from merge_core.planner import make_plan

pytestmark = [
    pytest.mark.usefixtures("before_hub"),
    # huggingface_hub 2.4's own, where it sends a file:
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),
]


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another merge, in one shard."""
    folder = tmp_path_factory.mktemp("others")
    small_merge(folder)
    plan = make_plan(folder / "base", [folder / "adapter"])
    merge(plan, folder / "out", device="cpu", choice=TWO_LANES)
    return folder / "out"


def plan_of(out: Path) -> str:
    """As it is told."""
    fingerprint: str = json.loads((out / ".raymeld" / "plan.json").read_bytes())["fingerprint"]
    return fingerprint[:12]


def state_of(target: Target) -> set[Path]:
    return set(target.state.rglob("*"))


def test_another_merge_is_replaced_whole_where_that_is_asked_for(
    target: Target, merged: Path, others: Path
) -> None:
    push(others)
    repo = target.hub.repos["me/merge"]
    check_destination(target.out, target.plan)
    (note,) = notes_on(target.out)
    assert note.what == f"holds a merge, of plan {plan_of(others)}"

    wanted = f"holds a merge of plan {plan_of(others)}; this one is {plan_of(merged)}. Choose .*"
    with pytest.raises(InputError, match=wanted + "give --overwrite to replace it: git keeps"):
        target.merge()
    assert state_of(target) == set()
    before = repo.refs["main"]

    target.merge(overwrite=True)

    assert_pushed(repo, merged, commits=3)
    assert "model.safetensors" in repo.commits[before]


def test_a_push_replaces_another_merge_where_that_is_asked_for(
    hub: Hub, merged: Path, others: Path
) -> None:
    push(merged)
    repo = hub.repos["me/merge"]
    wanted = f"plan {plan_of(merged)}; this one is {plan_of(others)}. .* give --overwrite"
    with pytest.raises(InputError, match=wanted):
        push(others)
    assert_pushed(repo, merged)

    push(others, overwrite=True)

    assert "model.safetensors" in head(repo)
    assert_pushed(repo, others, commits=3)


def test_this_very_merge_may_be_there_from_elsewhere(
    target: Target, merged: Path, before_hub: FaultProxy
) -> None:
    push(merged)
    before_hub.forget()
    target.merge()
    assert before_hub.tally("PUT").requests == 0
    assert set(SHARDS) < set(head(target.hub.repos["me/merge"]))


def test_a_replacement_that_was_stopped_goes_on_unless_a_third_merge_came(
    target: Target, merged: Path, others: Path, tmp_path: Path, before_hub: FaultProxy
) -> None:
    push(others)
    before_hub.faults(Fault(drop, path="/commit/", times=None))
    with pytest.raises(StorageError):
        target.merge(overwrite=True)
    before_hub.faults()
    small_merge(tmp_path / "third")
    plan = make_plan(tmp_path / "third" / "base", [(tmp_path / "third" / "adapter", 0.5)])
    merge(plan, tmp_path / "third" / "out", device="cpu", choice=TWO_LANES)
    push(tmp_path / "third" / "out", overwrite=True)
    repo = target.hub.repos["me/merge"]
    with pytest.raises(InputError, match=f"plan {plan_of(tmp_path / 'third' / 'out')}; this one"):
        target.merge()
    push(others, overwrite=True)

    assert target.merge().resumed == 4

    assert_pushed(repo, merged, commits=5)


def forget(repo: Repo) -> None:
    repo.commit({"model.safetensors": None})


def change(repo: Repo) -> None:
    repo.commit({"model.safetensors": b"another"})


def add(repo: Repo) -> None:
    repo.commit({"adapter_model.safetensors": b"more"})


def replace_recipe(repo: Repo) -> None:
    repo.commit({"raymeld.json": b'{"fingerprint": 7, "sha256": {}}'})


@pytest.mark.parametrize(
    ("spoil", "wanted"),
    [
        (forget, "committed weights since: model.safetensors there and in the raymeld.json"),
        (change, "committed weights since: model.safetensors there and in the raymeld.json"),
        (add, "committed weights since: adapter_model.safetensors there and"),
        (replace_recipe, "holds something else already: config.json"),
    ],
)
def test_weights_that_somebody_else_has_committed_are_never_replaced(
    target: Target, others: Path, merged: Path, spoil: Any, wanted: str
) -> None:
    push(others)
    repo = target.hub.repos["me/merge"]
    spoil(repo)
    before = head(repo)
    for go in (target.merge, lambda **how: push(merged, **how)):
        for overwrite in (False, True):
            with pytest.raises(InputError, match=wanted):
                go(overwrite=overwrite)
    assert head(repo) == before
    assert state_of(target) == set()


def test_a_finished_merge_is_known_though_its_model_was_made_public(
    target: Target, others: Path, before_hub: FaultProxy
) -> None:
    url = target.merge().url
    target.hub.repos["me/merge"].private = False
    before_hub.forget()
    there = state_of(target)

    again = target.merge()

    assert (again.receipts, again.url, state_of(target)) == ((), url, there)
    assert before_hub.tally("PUT").requests == before_hub.tally("POST").requests == 0
    check_destination(target.out, target.plan)
    target.plan = make_plan(target.plan.base, [(one.path, 0.5) for one in target.plan.adapters])
    for overwrite in (False, True):
        with pytest.raises(InputError, match="everybody can see it"):
            target.merge(overwrite=overwrite)
    assert state_of(target) == there

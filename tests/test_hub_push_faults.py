"""What the network does to a push: it comes to its end, or nothing of it is seen."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from fault_proxy import Exchange, Fault, FaultProxy, How, pass_on
from hub_client import QUICK
from hub_repos import Repo
from hub_server import Hub
from huggingface_hub import get_session
from network_faults import drop, drop_within, lose_answer, say, stall
from pushes import TOKEN, assert_pushed, head, push

from merge_core.errors import RaymeldError, StorageError, VerificationError
from merge_core.stores import hub_objects
from merge_core.stores.hub_errors import HubPlace
from merge_core.stores.hub_objects import HubObjects, Sent, asked

pytestmark = [
    pytest.mark.usefixtures("before_hub"),
    # huggingface_hub 2.4's own, where it sends a file:
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),
]


def test_a_push_that_was_stopped_sends_only_what_is_missing(
    merged: Path, hub: Hub, before_hub: FaultProxy
) -> None:
    before_hub.faults(Fault(drop, method="PUT", skip=2, times=None))
    with pytest.raises(StorageError, match=r"model-00003-of-00004.safetensors: .*in a row"):
        push(merged)
    repo = hub.repos["me/merge"]
    assert head(repo) == {}
    before_hub.faults()
    before_hub.forget()
    push(merged)
    assert_pushed(repo, merged)
    assert before_hub.tally("PUT").requests == 2


@pytest.mark.parametrize("how", [lose_answer, drop_within(5)], ids=["lost", "cut"])
def test_a_commit_whose_answer_is_lost_is_not_made_twice(
    merged: Path, hub: Hub, before_hub: FaultProxy, how: How
) -> None:
    before_hub.faults(Fault(how, path="/commit/"))
    url = push(merged)
    repo = hub.repos["me/merge"]
    assert_pushed(repo, merged)
    assert url.endswith(repo.refs["main"])
    assert before_hub.tally("POST", "/commit/").requests == 1


@pytest.mark.parametrize("how", [drop, say(503)], ids=["drop", "503"])
def test_a_commit_that_did_not_arrive_is_sent_again(
    merged: Path, hub: Hub, before_hub: FaultProxy, how: How
) -> None:
    before_hub.faults(Fault(how, path="/commit/", times=2))
    push(merged)
    assert_pushed(hub.repos["me/merge"], merged)
    assert before_hub.tally("POST", "/commit/").requests == 3


def test_a_commit_without_an_answer_is_given_up(
    merged: Path,
    hub: Hub,
    before_hub: FaultProxy,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hub_objects, "ANSWER_SECONDS", 0.5)
    before_hub.faults(Fault(stall(), path="/commit/"))
    push(merged)
    assert_pushed(hub.repos["me/merge"], merged)


def test_a_stale_parent_is_said_and_nothing_is_committed(
    merged: Path, hub: Hub, before_hub: FaultProxy
) -> None:
    repo = hub.repo("me/merge", {}, private=True)
    started = repo.refs["main"]

    def meanwhile(exchange: Exchange) -> None:
        repo.commit({"notes.md": b"by another"})
        pass_on(exchange)

    before_hub.faults(Fault(meanwhile, path="/commit/"))
    with pytest.raises(StorageError, match="somebody else has committed meanwhile") as raised:
        push(merged)
    assert f"{started[:12]} at the beginning, and is {repo.refs['main'][:12]} now" in str(
        raised.value
    )
    assert head(repo) == {"notes.md": b"by another"}


@pytest.mark.parametrize("route", ["/repos/create", "/preupload/", "/objects/batch", "^/lfs/"])
@pytest.mark.parametrize("how", [drop, lose_answer, say(503)], ids=["drop", "lost", "503"])
def test_everything_else_is_asked_again(
    merged: Path,
    hub: Hub,
    before_hub: FaultProxy,
    how: How,
    route: str,
) -> None:
    before_hub.faults(Fault(how, path=route))
    push(merged)
    assert_pushed(hub.repos["me/merge"], merged)


def test_nobody_elses_requests_are_bounded_in_time(hub: Hub) -> None:
    hub.repo("me/merge", {})
    place = HubPlace(repo="me/merge", revision="main")
    absent = Sent(name="a.safetensors", size=1, sha256="0" * 64)
    assert HubObjects(place, QUICK).missing([absent]) == [
        absent
    ]  # the session knows the hook by now
    seen: list[tuple[str, Any]] = []
    session = get_session()
    session.event_hooks["request"].append(
        lambda request: seen.append((request.url.path, request.extensions["timeout"]["read"]))
    )

    def attempt() -> None:
        with ThreadPoolExecutor(1) as other:
            other.submit(session.get, f"{hub.address}/api/beside").result()
        session.get(f"{hub.address}/api/whole")
        session.get(f"{hub.address}/api/short", timeout=5.0)

    asked(attempt, place, QUICK)
    session.get(f"{hub.address}/api/after")

    bound = hub_objects.ANSWER_SECONDS
    wanted = {"/api/beside": None, "/api/whole": bound, "/api/short": 5.0, "/api/after": None}
    assert dict(seen) == wanted
    assert session.timeout.read is None


def test_a_hub_that_holds_something_else_afterwards_is_reported(
    merged: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = Repo.commit

    def damage(repo: Repo, files: dict[str, bytes], *rest: str) -> str:
        if "config.json" in files:
            files = {**files, "model-00003-of-00004.safetensors": b"lost"}
        return commit(repo, files, *rest)

    monkeypatch.setattr(Repo, "commit", damage)
    with pytest.raises(VerificationError, match=r"or nothing: model-00003-of-00004.safetensors"):
        push(merged)


def test_a_token_is_in_no_error_of_a_push(
    merged: Path,
    before_hub: FaultProxy,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("DEBUG")
    shown: list[str] = []
    for route in ("/repos/create", "/objects/batch", "^/lfs/", "/commit/"):
        before_hub.faults(Fault(say(400, b'{"error": "no"}'), path=route, times=None))
        with pytest.raises(RaymeldError) as raised:
            push(merged, said=shown)
        error = raised.value
        shown += [str(error), repr(error), repr(vars(error)), repr(error.__cause__)]
    assert len(shown) >= 16
    assert not [text for text in [*shown, caplog.text] if TOKEN in text]

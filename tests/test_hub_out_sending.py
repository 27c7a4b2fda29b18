"""Shards on their way to the hub: within the scratch, read back, held before the commit."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from fault_proxy import Exchange, Fault, FaultProxy, pass_on
from handmade import TWO_LANES
from hub_client import HubClient
from hub_repos import Xet, sha256
from hub_target import SHARDS, Target
from pushes import head

from merge_core.claim import begin, claim
from merge_core.errors import AbsentError, InputError, StorageError, VerificationError
from merge_core.progress import Progress
from merge_core.stores import scratch
from merge_core.stores.hub_objects import HubObjects
from merge_core.stores.hub_out import HubOut, SentFile
from merge_core.stores.local import LocalStore
from merge_core.stores.opening import open_hub_out
from merge_core.stores.scratch import Scratch, ScratchPart
from merge_core.worker import ShardWorker

pytestmark = [
    pytest.mark.usefixtures("before_hub"),
    # huggingface_hub 2.4's own, where it sends a file:
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),
]


def test_workers_of_a_node_keep_within_its_limit(
    target: Target, before_hub: FaultProxy, merged: Path
) -> None:
    largest = max((merged / name).stat().st_size for name in SHARDS)
    target.limit(largest * 3 // 2)
    plan = begin(target.plan, target.out, "digest")
    seen: list[int] = []

    def look(exchange: Exchange) -> None:
        seen.append(sum(path.stat().st_size for path in target.waiting()))
        pass_on(exchange)

    before_hub.faults(Fault(look, method="PUT", times=None))
    with claim(plan, target.out, overwrite=False, say=print):

        def work(shards: Sequence[int]) -> None:
            with closing(ShardWorker(plan, target.out, "cpu", choice=TWO_LANES)) as worker:
                for shard in shards:
                    worker.merge(shard, 1, lambda _: None)

        with ThreadPoolExecutor(2) as pool:
            list(pool.map(work, [(0, 1), (2, 3)]))
    assert len(seen) == 4
    assert max(seen) <= largest * 3 // 2
    assert target.waiting() == []


def test_a_merge_says_that_it_waits_and_that_its_scratch_is_memory(
    target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    target.limit(max(shard.size for shard in target.plan.shards))
    others, said = Scratch(str(target.scratch), None).start("others", 1), list[str]()
    monkeypatch.setattr(scratch.time, "sleep", lambda _: others.discard())
    monkeypatch.setattr(scratch, "file_system_of", lambda _: "tmpfs")
    target.merge(say=said.append)
    assert said[0] == (
        f"{target.scratch} is memory, not a disk (tmpfs): each file of the result lies there until"
        " it is sent"
    )
    (waits,) = (line for line in said if "waits" in line)
    assert waits.startswith(f"this process waits for room in {target.scratch}, which holds 1")


def test_a_scratch_that_cannot_be_written_ends_a_merge_before_it_reads(
    target: Target, before_hub: FaultProxy
) -> None:
    target.scratch.write_text("no folder")
    with pytest.raises(InputError, match=r"--scratch .*/scratch: Not a directory"):
        target.merge()
    assert before_hub.tally("PUT").requests == 0
    target.scratch.unlink()
    target.merge()
    shutil.rmtree(target.scratch)
    target.scratch.write_text("no folder")
    assert target.merge().receipts == ()  # what is there needs none


def test_who_watches_hears_of_a_merge_while_it_sends(
    target: Target, before_hub: FaultProxy
) -> None:
    sending, heard = threading.Event(), threading.Event()

    def wait(exchange: Exchange) -> None:
        sending.set()
        assert heard.wait(10)
        pass_on(exchange)

    def watch(progress: Progress) -> None:
        if sending.is_set():
            heard.set()

    before_hub.faults(Fault(wait, method="PUT"))
    target.merge(watch=watch)
    assert heard.is_set()


def test_what_the_watching_raises_while_it_sends_ends_the_merge(
    target: Target, before_hub: FaultProxy
) -> None:
    sending, raised = threading.Event(), threading.Event()

    def wait(exchange: Exchange) -> None:
        sending.set()
        assert raised.wait(10)
        pass_on(exchange)

    def watch(progress: Progress) -> None:
        if sending.is_set():
            raised.set()
            raise KeyboardInterrupt

    before_hub.faults(Fault(wait, method="PUT"))
    with pytest.raises(KeyboardInterrupt):
        target.merge(watch=watch)
    assert target.waiting() == []
    assert target.merge().resumed == 0


def test_what_the_scratch_does_not_keep_is_not_sent(
    target: Target, before_hub: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish = ScratchPart.finish

    def damage(part: ScratchPart) -> str:
        with part.path.open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"?")
        return finish(part)

    monkeypatch.setattr(ScratchPart, "finish", damage)
    with pytest.raises(StorageError, match="what is read back is not what was written: "):
        target.merge()
    assert before_hub.tally("PUT").requests == 0
    assert target.waiting() == []


def test_a_record_that_says_something_else_fails_the_verification(
    target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    part_of = HubOut.part_of

    def lie(store: HubOut, name: str, sent: SentFile) -> str:
        digests = dict.fromkeys(sent.digests, "0" * 32)
        return part_of(store, name, replace(sent, digests=digests))

    monkeypatch.setattr(HubOut, "part_of", lie)
    with pytest.raises(VerificationError, match="when it was sent, the ledger says"):
        target.merge()
    assert head(target.hub.repos["me/merge"]) == {}


@pytest.mark.parametrize("tells", [True, False])
def test_shards_go_through_xet_if_the_hub_tells_of_them_before_the_commit(
    target: Target,
    merged: Path,
    client: HubClient,
    before_hub: FaultProxy,
    monkeypatch: pytest.MonkeyPatch,
    tells: bool,
) -> None:
    """The local hub does not; whether the real one does is not known."""
    client.use_xet()
    if tells:
        monkeypatch.setattr(HubObjects, "_wanted", lambda *_: set())
    target.merge()

    files = head(target.hub.repos["me/merge"])
    assert before_hub.tally("PUT").requests == (0 if tells else 4)
    for name in SHARDS:
        data = (merged / name).read_bytes()
        assert files[name] == (Xet(oid=sha256(data), size=len(data)) if tells else data)


def test_a_part_is_published_once_and_as_it_was_planned(
    target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, name = open_hub_out(target.out), SHARDS[0]
    sent = SentFile(part="1-a", size=9, sha256="0" * 64, header=b"header", digests={"t": "1"})
    for part in ("1-a", "2-b"):
        store.part_of(name, replace(sent, part=part))
    assert name not in {one.name for one in store.list()}
    with pytest.raises(StorageError, match="9 of 8 bytes"):
        store.publish("1-a", name, 8)

    for _ in range(2):
        store.publish("1-a", name, 9)

    assert (store.sent(name), store.look(name).pin) == (sent, "0" * 64)
    with monkeypatch.context() as alone:  # a list reads no record
        alone.setattr(LocalStore, "get", None)
        assert {one.name: one.size for one in store.list()}[name] is None
    assert store.look(name).size == 9
    with pytest.raises(StorageError, match="another writer made"):
        store.publish("2-b", name, 9)
    store.sweep(name)
    store.delete(name)
    with pytest.raises(AbsentError, match="part of attempt 2-b is gone"):
        store.publish("2-b", name, 9)
    with pytest.raises(AbsentError, match="was not sent to the hub"):
        store.look(name)

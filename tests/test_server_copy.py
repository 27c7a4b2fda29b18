"""What is unchanged and lies in the same S3 is copied there, and not sent."""

from __future__ import annotations

import dataclasses
import signal
import threading
import time
from pathlib import Path

import pytest
from fault_proxy import Exchange, Fault, FaultProxy, How
from handmade import (
    GEOMETRY,
    TWO_LANES,
    published,
    random_factors,
    random_tensors,
    small_merge,
    write_adapter,
    write_base,
)
from network_faults import drop, say
from s3_server import refusal, uploads

from merge_core import background
from merge_core.errors import StorageError
from merge_core.merge import merge
from merge_core.model_card import CARD
from merge_core.plan import MergePlan
from merge_core.planner import make_plan
from merge_core.server_copy import copied_file, copy_notes
from merge_core.stores import s3_copy
from merge_core.stores.location import Access, Location
from merge_core.stores.opening import open_store, read_file
from merge_core.stores.s3 import S3Store
from merge_core.stores.s3_client import client_for
from merge_core.stores.s3_copy import S3CopiedPart
from merge_core.stores.s3_retries import COPYING

LAST = {name: shape for name, shape in GEOMETRY.linear.items() if ".layers.1." in name}
"""The modules of one layer of two."""


@pytest.fixture
def few(tmp_path: Path) -> Path:
    """An adapter of one layer."""
    factors = random_factors(GEOMETRY.linear, dict.fromkeys(LAST, 4), seed=7)
    return write_adapter(tmp_path / "few", factors, r=4, lora_alpha=8)


@pytest.fixture
def base(tmp_path: Path, s3_store: S3Store) -> Location:
    """The result of another merge, in S3, behind the proxy."""
    merge(small_merge(tmp_path), tmp_path / "first", choice=TWO_LANES)
    for name, data in published(tmp_path / "first").items():
        open_store(s3_store.location / "first").put(name, data)
    return s3_store.location / "first"


@pytest.fixture
def expected(base: Location, tmp_path: Path, few: Path) -> dict[str, bytes]:
    """Of the same merge on a disk."""
    plan = make_plan(tmp_path / "first", [few], shard_bytes=18_000)
    merge(plan, tmp_path / "second", choice=TWO_LANES)
    return {name: data for name, data in published(tmp_path / "second").items() if name != CARD}


def planned(base: Location, adapter: Path, **options: object) -> MergePlan:
    return make_plan(base, [adapter], **{"shard_bytes": 18_000, "access": base.access, **options})


def contents(out: Location) -> dict[str, bytes]:
    listed = (one.name for one in open_store(out).list())
    names = [name for name in listed if not name.startswith(".") and name != CARD]
    return {name: read_file(out / name) for name in names}


@pytest.mark.parametrize("bucket", ["", "another"])
def test_unchanged_shards_are_copied_by_the_server_and_not_sent(
    base: Location,
    few: Path,
    expected: dict[str, bytes],
    s3_proxy: FaultProxy,
    monkeypatch: pytest.MonkeyPatch,
    bucket: str,
) -> None:
    monkeypatch.setattr(s3_copy, "COPY_BYTES", 10_000)  # a range of a copy
    out = dataclasses.replace(base, root=bucket or base.root, path="second")
    if bucket:
        client_for(base.access).create_bucket(Bucket=bucket)
    plan = planned(base, few)
    changed = {shard.name for shard in plan.shards if any(t.updates for t in shard.tasks)}
    size = sum(shard.size for shard in plan.shards if shard.name not in changed)
    s3_proxy.forget()

    (note,) = copy_notes(plan, out)
    assert note == (
        f"3 of 4 shards ({size / 1e9:.1f} GB) lie unchanged in {base}:"
        " S3 copies them within itself, and they are not uploaded"
    )
    result = merge(plan, out, choice=TWO_LANES)

    assert (len(changed), len(plan.shards)) == (1, 4)
    assert contents(out) == expected
    assert result.verified is not None
    assert result.verified.ok
    sent = {one.target.partition("?")[0] for one in s3_proxy.seen("PUT", "part") if one.received}
    assert sent == {f"/{out.root}/second/{name}" for name in changed}
    copies = [one for one in s3_proxy.seen("PUT", "part") if "x-amz-copy-source" in one.headers]
    assert len(copies) == sum(-(-s.size // 10_000) for s in plan.shards if s.name not in changed)
    assert uploads(out) == []


@pytest.mark.parametrize(
    ("how", "times", "why"),
    [
        (refusal(501, "NotImplemented"), 1, "NotImplemented"),
        (refusal(403, "AccessDenied"), 1, "AccessDenied"),
        (say(200, ETag='"1"'), 1, "no answer to a copy"),
        (refusal(503, "SlowDown"), COPYING.attempts, "SlowDown"),
        (drop, COPYING.attempts, "no answer"),
    ],
)
def test_where_the_server_does_not_copy_everything_is_sent_and_it_is_said_once(
    base: Location,
    few: Path,
    expected: dict[str, bytes],
    s3_proxy: FaultProxy,
    how: How,
    times: int,
    why: str,
) -> None:
    out, said = dataclasses.replace(base, path="second"), list[str]()
    plan = planned(base, few)
    s3_proxy.faults(Fault(how, method="PUT", path="partNumber", times=times))

    merge(plan, out, choice=TWO_LANES, say=said.append)

    (line,) = said
    assert line == (
        f"the server copies nothing within itself ({why}):"
        " shards in which nothing changes are uploaded too"
    )
    assert contents(out) == expected
    assert uploads(out) == []


def test_a_file_that_is_replaced_before_it_is_copied_ends_the_merge(
    base: Location, few: Path, s3_proxy: FaultProxy
) -> None:
    out, plan = dataclasses.replace(base, path="second"), planned(base, few)
    name = plan.base_files[0].name
    other = read_file(base / name)[::-1]
    replaced = say(412, b"<Error><Code>PreconditionFailed</Code></Error>")
    s3_proxy.faults(Fault(replaced, method="PUT", path="partNumber"))
    with pytest.raises(StorageError, match=f"{base / name}: the file changed while"):
        merge(plan, out, choice=TWO_LANES)
    open_store(base).put(name, other)
    with pytest.raises(StorageError, match=f"{base / name}: the file changed while"):
        merge(plan, out, choice=TWO_LANES)
    assert [one for one in contents(out) if one.endswith(".safetensors")] == []
    assert uploads(out) == []


def test_who_stops_a_merge_does_not_wait_for_copies_of_a_store_that_is_gone(
    base: Location, few: Path, s3_proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(background, "LEAVE_SECONDS", 0.05)
    monkeypatch.setattr(s3_copy, "COPY_BYTES", 10_000)
    plan = planned(base, few)
    origin = next(copied for s in plan.shards if (copied := copied_file(plan, s, base.parent)))
    began = list[float]()

    def lose(exchange: Exchange) -> None:
        if not began:
            began.append(time.monotonic())
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        exchange.wait_for_client()

    s3_proxy.faults(Fault(lose, method="PUT", path="partNumber", times=None))
    with pytest.raises(KeyboardInterrupt):
        S3CopiedPart(base.parent / "copy", base / origin.name, origin, "1-a")
    assert time.monotonic() - began[0] < 5
    assert uploads(base.parent) == []


def test_only_a_whole_file_of_the_same_s3_is_copied(
    base: Location, few: Path, tmp_path: Path
) -> None:
    def copied(plan: MergePlan, out: Location) -> int:
        return sum(copied_file(plan, shard, out) is not None for shard in plan.shards)

    out, elsewhere = base.parent / "out", Access(endpoint_url="http://127.0.0.1:1")
    assert copied(planned(base, few), out) == 3
    assert copied(planned(base, few), dataclasses.replace(out, access=elsewhere)) == 0
    assert copied(planned(base, few), Location(scheme="file", path="/out")) == 0
    assert copied(planned(base, few), Location(scheme="gs", root="b")) == 0
    assert copied(planned(base, few, dtype="float32"), out) == 0
    assert copied(planned(base, few, shard_bytes=50_000), out) == 0  # other files
    theirs = write_base(tmp_path / "theirs", random_tensors(GEOMETRY), GEOMETRY.config)
    for path in theirs.iterdir():
        open_store(base.parent / "theirs").put(path.name, path.read_bytes())
    few_in_it = planned(base.parent / "theirs", few, shard_bytes=10**9)
    assert copied(few_in_it, out) == 0

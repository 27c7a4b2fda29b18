"""The commit: one attempt of each shard is taken, config.json is last, and crashes are repaired."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from handmade import (
    INDEX,
    TWO_LANES,
    Geometry,
    assert_no_checkpoint,
    files_below,
    header_of,
    ignore_progress,
    published,
    random_factors,
    random_tensors,
    write_adapter,
    write_base,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from leases import take_over, unheard
from transformers.utils.hub import get_checkpoint_shard_files

from merge_core.claim import claim
from merge_core.commit import Assembly
from merge_core.errors import LeaseLostError, RaymeldError, StorageError, VerificationError
from merge_core.factors import seal
from merge_core.lease import holder_of
from merge_core.ledger import Receipt, TensorRecord
from merge_core.merge import merge
from merge_core.output import LEASE, PROGRESS, RUNS, VERIFIED
from merge_core.plan import MergePlan
from merge_core.planner import make_plan
from merge_core.progress import Progress
from merge_core.stores.local import LocalStore
from merge_core.stores.location import locate
from merge_core.worker import ShardWorker

GEOMETRY = Geometry()


@pytest.fixture(scope="module")
def sealed(tmp_path_factory: pytest.TempPathFactory) -> MergePlan:
    path = tmp_path_factory.mktemp("commit")
    base = write_base(path / "base", random_tensors(GEOMETRY), GEOMETRY.config, files=2)
    factors = random_factors(GEOMETRY.linear, dict.fromkeys(GEOMETRY.linear, 4))
    adapter = write_adapter(path / "adapter", factors, r=4, lora_alpha=8)
    return seal(make_plan(base, [adapter], shard_bytes=18_000))


@pytest.fixture
def worker(sealed: MergePlan, out: Path) -> Iterator[ShardWorker]:
    with claim(sealed, locate(out), overwrite=False, say=unheard):
        worker = ShardWorker(sealed, locate(out), "cpu", "worker-0", TWO_LANES)
        yield worker
        worker.close()


def assemble(plan: MergePlan, out: Path) -> Assembly:
    """The assembly of whoever has the lease."""
    holder = holder_of(locate(out))
    assert holder is not None
    return Assembly(plan, locate(out), holder.run)


def part_of(out: Path, receipt: Receipt) -> Path:
    return out / ".raymeld" / "parts" / receipt.part


def test_an_accepted_part_becomes_the_shard_and_its_receipt_is_kept(
    sealed: MergePlan, worker: ShardWorker, out: Path
) -> None:
    receipt = worker.merge(1, 1, ignore_progress)
    content = part_of(out, receipt).read_bytes()
    assembly = assemble(sealed, out)

    assert assembly.accept(receipt) is True
    assert assembly.accept(receipt) is True  # the driver asks again if the collector died
    assert published(out) == {sealed.shards[1].name: content}
    assert not part_of(out, receipt).exists()
    kept = out / ".raymeld" / "receipts" / "shard-00001.json"
    assert Receipt.from_json(kept.read_bytes()) == receipt
    assert assemble(sealed, out).receipts.keys() == {1}


def test_a_crash_between_receipt_and_name_is_repaired_by_the_next_assembly(
    sealed: MergePlan, worker: ShardWorker, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    receipt = worker.merge(0, 1, ignore_progress)
    content = part_of(out, receipt).read_bytes()
    assembly = assemble(sealed, out)
    with monkeypatch.context() as patch:
        patch.setattr(Assembly, "_publish_shard", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            assembly.accept(receipt)
    assert published(out) == {}

    rebuilt = assemble(sealed, out)

    assert rebuilt.receipts.keys() == {0}
    assert published(out) == {sealed.shards[0].name: content}
    assert rebuilt.accept(receipt) is True


def test_a_late_twin_is_thrown_away_and_changes_nothing(
    sealed: MergePlan, worker: ShardWorker, out: Path
) -> None:
    first, twin = (worker.merge(0, attempt, ignore_progress) for attempt in (1, 2))
    part_of(out, twin).write_bytes(b"whatever a zombie writes")
    assembly = assemble(sealed, out)
    assembly.accept(first)
    before = files_below(out)

    assert assembly.accept(twin) is False
    assert assemble(sealed, out).accept(twin) is False
    assert files_below(out) == {n: d for n, d in before.items() if twin.part not in n}
    assert assembly.receipts.keys() == {0}


@pytest.mark.parametrize(
    ("lie", "said"),
    [
        (lambda r: dataclasses.replace(r, fingerprint="ab" * 32), "from plan abababababab"),
        (lambda r: dataclasses.replace(r, tensors=r.tensors[:-1]), "not those of the plan"),
        (lambda r: dataclasses.replace(r, tensors=r.tensors[::-1]), "not those of the plan"),
    ],
    ids=["fingerprint", "a tensor missing", "another order"],
)
def test_a_receipt_that_does_not_match_the_plan_is_refused_with_the_shards_name(
    sealed: MergePlan, worker: ShardWorker, out: Path, lie: Any, said: str
) -> None:
    receipt = lie(worker.merge(1, 1, ignore_progress))
    assembly = assemble(sealed, out)

    with pytest.raises(RaymeldError, match=said) as caught:
        assembly.accept(receipt)

    assert caught.value.where == f"{sealed.shards[1].name}, attempt 1 by worker-0"
    assert assembly.receipts == {}
    assert published(out) == {}


@pytest.mark.parametrize("damage", ["shorter", "longer", "another header"])
def test_a_part_that_is_not_as_planned_is_refused_with_the_shards_name(
    sealed: MergePlan, worker: ShardWorker, out: Path, damage: str
) -> None:
    receipt = worker.merge(0, 1, ignore_progress)
    content = part_of(out, receipt).read_bytes()
    at = content.index(b"BF16")
    other = content[:at] + b"XF16" + content[at + 4 :]
    damaged = {"shorter": content[:-1], "longer": content + b"\0", "another header": other}
    part_of(out, receipt).write_bytes(damaged[damage])

    with pytest.raises(StorageError, match="is not as planned") as caught:
        assemble(sealed, out).accept(receipt)

    assert sealed.shards[0].name in caught.value.where
    assert published(out) == {}
    assert assemble(sealed, out).receipts == {}


def test_a_part_that_vanished_and_a_shard_that_nobody_planned_are_refused(
    sealed: MergePlan, worker: ShardWorker, out: Path
) -> None:
    receipt = worker.merge(0, 1, ignore_progress)
    part_of(out, receipt).unlink()
    assembly = assemble(sealed, out)

    with pytest.raises(StorageError, match=receipt.part):
        assembly.accept(receipt)
    with pytest.raises(RaymeldError, match="no shard 99"):
        assembly.accept(dataclasses.replace(receipt, shard=99))
    with pytest.raises(RaymeldError, match="no shard -1"):
        assembly.accept(dataclasses.replace(receipt, shard=-1))
    assert assembly.receipts == {}


def test_the_record_is_not_written_while_shards_are_missing(
    sealed: MergePlan, worker: ShardWorker, out: Path
) -> None:
    assembly = assemble(sealed, out)
    assembly.accept(worker.merge(1, 1, ignore_progress))
    others = sorted(set(range(len(sealed.shards))) - {1})

    with pytest.raises(RaymeldError, match="are missing") as caught:
        assembly.write_record()

    assert caught.value.what == f"shards {others} are missing"
    assert set(published(out)) == {sealed.shards[1].name}


def test_a_lease_that_is_lost_while_the_inputs_are_looked_at_publishes_nothing(
    sealed: MergePlan, worker: ShardWorker, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assembly, put = assemble(sealed, out), LocalStore.put
    for shard in sealed.shards:
        assembly.accept(worker.merge(shard.index, 1, ignore_progress))
    assembly.write_record()

    def write_and_lose(store: LocalStore, name: str, data: bytes, **how: bool) -> None:
        put(store, name, data, **how)
        if name == VERIFIED:
            take_over(out).release()

    monkeypatch.setattr(LocalStore, "put", write_and_lose)
    with pytest.raises(LeaseLostError, match="another merge has taken OUT over"):
        assembly.publish({})
    assert not (out / "config.json").exists()


def breaking(monkeypatch: pytest.MonkeyPatch, name: str, fatal: int) -> Iterator[int]:
    """Have the ``fatal``-th call of a store's method raise before it does anything."""
    calls, real = itertools.count(1), getattr(LocalStore, name)

    def call(store: LocalStore, what: str, *args: Any, **options: Any) -> Any:
        # Those come when it is time, or are never an error.
        counts = not what.startswith((PROGRESS, LEASE, RUNS))
        if counts and next(calls) == fatal:
            raise StorageError("broken disk", what)
        return real(store, what, *args, **options)

    monkeypatch.setattr(LocalStore, name, call)
    return calls


@pytest.mark.parametrize("name", ["put", "publish", "start"])
def test_whichever_write_fails_there_is_no_config_json_and_the_same_merge_again_goes_on(
    sealed: MergePlan, tmp_path: Path, name: str
) -> None:
    merge(sealed, tmp_path / "reference", choice=TWO_LANES)
    for fatal in itertools.count(1):
        out = tmp_path / f"out-{fatal}"
        with pytest.MonkeyPatch.context() as patch:
            calls = breaking(patch, name, fatal)
            try:
                merge(sealed, out, choice=TWO_LANES)
            except StorageError:
                assert not (out / "config.json").exists(), fatal
            else:
                break
        merge(sealed, out, choice=TWO_LANES)
        assert published(out) == published(tmp_path / "reference"), fatal

    # Every one was the one that failed. Put are config to publish, recipe and plan, receipts, side
    # files, card, index, ledger, verified.json and config.json.
    shards, side_files = len(sealed.shards), len(sealed.side_files)
    times = {"put": 3 + shards + side_files + 5, "publish": shards, "start": shards}
    assert next(calls) == fatal == 1 + times[name]
    assert (out / "config.json").read_bytes() == (sealed.base / "config.json").local.read_bytes()
    assert not (out / ".raymeld" / "parts").exists()
    assert not (out / ".raymeld" / "receipts").exists()


def test_a_bit_that_flips_before_the_verification_ends_it_and_nothing_is_published(
    sealed: MergePlan, out: Path
) -> None:
    def watch(progress: Progress) -> None:
        path = out / sealed.shards[2].name
        if progress.phase == "verifying" and progress.done == 0:
            content = bytearray(path.read_bytes())
            content[-1] ^= 1
            path.write_bytes(content)

    with pytest.raises(VerificationError, match="1 check failed") as caught:
        merge(sealed, out, choice=TWO_LANES, watch=watch)

    assert caught.value.exit_code == 3
    assert sealed.shards[2].name in str(caught.value)
    assert_no_checkpoint(out)


@pytest.mark.parametrize("phase", ["merging", "verifying"])
def test_an_interrupted_merge_leaves_no_part_and_no_config_json(
    sealed: MergePlan, out: Path, phase: str
) -> None:
    def watch(progress: Progress) -> None:
        if progress.phase == phase:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge(sealed, out, choice=TWO_LANES, watch=watch)

    assert_no_checkpoint(out)


REAL = st.floats(allow_nan=False)
WHOLE = st.integers(0, 2**63)
RECORDS = st.builds(
    TensorRecord,
    tensor=st.text(),
    shape=st.lists(WHOLE).map(tuple),
    base_norm=st.none() | REAL,
    delta_norm=st.none() | REAL,
    largest_change=st.none() | REAL,
    read_seconds=REAL,
    merge_seconds=REAL,
    write_seconds=REAL,
)
RECEIPTS = st.builds(
    Receipt, tensors=st.lists(RECORDS, max_size=3).map(tuple), started=REAL, seconds=REAL
)


@settings(max_examples=50, derandomize=True, deadline=None)
@given(receipt=RECEIPTS)
def test_a_receipt_survives_json(receipt: Receipt) -> None:
    assert Receipt.from_json(receipt.to_json()) == receipt


def test_the_index_is_what_transformers_expects(sealed: MergePlan, out: Path) -> None:
    merge(sealed, out, choice=TWO_LANES)
    index = json.loads((out / INDEX).read_bytes())
    headers = {path.name: header_of(path) for path in out.glob("*.safetensors")}
    held = {n: f for f, names in headers.items() for n in names if n != "__metadata__"}
    sizes = [tensor.nbytes for tensor in random_tensors(GEOMETRY).values()]

    assert index["metadata"]["total_size"] == sum(sizes)
    assert index["weight_map"] == held
    assert held.keys() == GEOMETRY.shapes.keys()
    files, metadata = get_checkpoint_shard_files(str(out), str(out / INDEX))
    assert files == [str(out / name) for name in sorted(headers)]
    assert set(metadata["all_checkpoint_keys"]) == GEOMETRY.shapes.keys()

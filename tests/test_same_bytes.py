"""The same bytes and the same record, however the work is cut up, ordered, read or retried."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from handmade import (
    TWO_LANES,
    Geometry,
    deltas_of,
    header_of,
    ignore_progress,
    published,
    random_factors,
    random_tensors,
    write_adapter,
    write_base,
    write_raw,
)
from leases import unheard
from merged_by_hand import NAMES, naive_digest, raw
from models import assert_same_tensors, read_tensors
from oracles import merged_like_peft

from merge_core import storage
from merge_core.claim import claim
from merge_core.commit import Assembly
from merge_core.digest import bytes_digest
from merge_core.errors import StorageError
from merge_core.factors import seal
from merge_core.memory import LaneChoice
from merge_core.merge import merge
from merge_core.plan import MergePlan
from merge_core.planner import make_plan
from merge_core.storage import RangeReader
from merge_core.stores.location import locate
from merge_core.verdict import conclude
from merge_core.verify import verify
from merge_core.worker import ShardWorker

GEOMETRY = Geometry(hidden=260, inner=17003, heads=2, kv_heads=1, layers=1, vocab=90)
"""Two matrices of 8.8 MB: more than a cell of the digest, with rows that cells cut through."""
FACTORS = random_factors(GEOMETRY.linear, dict.fromkeys(GEOMETRY.linear, 5))
Files = dict[str, bytes]


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    # Three bytes that belong to nobody: in some bases they stand before everything else.
    return {**random_tensors(GEOMETRY), "extra": torch.tensor([1, 2, 3], dtype=torch.uint8)}


@pytest.fixture(scope="module")
def large(tensors: dict[str, torch.Tensor], tmp_path_factory: pytest.TempPathFactory) -> MergePlan:
    path = tmp_path_factory.mktemp("large")
    base = write_base(path / "base", tensors, GEOMETRY.config)
    adapter = write_adapter(path / "adapter", FACTORS, r=5, lora_alpha=7)
    return make_plan(base, [adapter], shard_bytes=60_000)


@pytest.fixture(scope="module")
def reference(
    large: MergePlan,
    tensors: dict[str, torch.Tensor],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """One lane and the largest reads; proven right."""
    out = tmp_path_factory.mktemp("reference") / "out"
    merge(large, out, choice=choice(1, 8), level="numeric")
    assert_same_tensors(read_tensors(out), merged_like_peft(tensors, deltas_of(FACTORS, 7 / 5)))
    return out


def choice(lanes: int, mebibytes: int) -> LaneChoice:
    return LaneChoice(lanes=lanes, read_bytes=mebibytes << 20, reason="the test says so")


def check_same(plan: MergePlan, reference: Path, out: Path, **options: Any) -> None:
    merge(plan, out, level="structure", **options)
    assert published(out) == published(reference)


@pytest.mark.parametrize("mebibytes", [1, 2, 4, 8])
@pytest.mark.parametrize("lanes", [1, 2, 4, 7])
def test_lanes_and_sizes_of_reads_change_no_byte(
    lanes: int, mebibytes: int, large: MergePlan, reference: Path, out: Path
) -> None:
    check_same(large, reference, out, choice=choice(lanes, mebibytes))

    assert digests(out) == digests(reference)


def test_files_that_cannot_be_opened_directly_give_the_same_bytes(
    monkeypatch: pytest.MonkeyPatch, large: MergePlan, reference: Path, out: Path
) -> None:
    monkeypatch.setattr(storage, "_DIRECT", 0)

    check_same(large, reference, out, choice=TWO_LANES)


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("shift", [0, 1, 8, 4093])
def test_base_tensors_may_start_at_any_byte(
    shift: int,
    direct: bool,
    monkeypatch: pytest.MonkeyPatch,
    large: MergePlan,
    tensors: dict[str, torch.Tensor],
    reference: Path,
    tmp_path: Path,
    out: Path,
) -> None:
    base = write_base(tmp_path / "base", {}, GEOMETRY.config)
    write_shifted(base / "model.safetensors", tensors, shift)
    plan = make_plan(base, [large.adapters[0].path], shard_bytes=60_000)
    assert (3 + shift) % 8 in {task.source.tensor.offset % 8 for task in plan.tasks if task.updates}
    if not direct:
        monkeypatch.setattr(storage, "_DIRECT", 0)

    check_same(plan, reference, out, choice=TWO_LANES)


@pytest.fixture
def held() -> Iterator[contextlib.ExitStack]:
    """Let go of at the end of the test."""
    with contextlib.ExitStack() as stack:
        yield stack


def write_shifted(path: Path, tensors: dict[str, torch.Tensor], shift: int) -> None:
    """Data that starts ``shift`` bytes behind a page, with the three odd bytes first."""
    entries: dict[str, Any] = {}
    end = 0
    for name in sorted(tensors, key=lambda n: (n != "extra", n)):
        size = tensors[name].nbytes
        shape = list(tensors[name].shape)
        dtype = {**NAMES, torch.uint8: "U8"}[tensors[name].dtype]
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(entries).encode()
    text += b" " * ((shift - 8 - len(text)) % 4096)
    write_raw(path, text, b"".join(raw(tensors[name]) for name in entries))


def test_any_order_of_shards_gives_the_same_checkpoint(plan: MergePlan, tmp_path: Path) -> None:
    sealed = seal(plan)
    assert len(sealed.shards) == 4
    merge(plan, tmp_path / "reference")
    expected = published(tmp_path / "reference")
    worker: ShardWorker | None = None
    for number, order in enumerate(itertools.permutations(range(4))):
        out = tmp_path / str(number)
        with claim(sealed, locate(out), overwrite=False, say=unheard) as holder:
            assert holder is not None
            assembly = Assembly(sealed, locate(out), holder.run)
            worker = ShardWorker(sealed, locate(out), "cpu", choice=TWO_LANES)
            for shard in order:
                assembly.accept(worker.merge(shard, 1, ignore_progress))
            worker.close()
            assembly.write_record()
            conclude(assembly, verify(out, committed=False))

        assert published(out) == expected, order


@pytest.mark.parametrize("last_read", [0, 1, 11, 23])
def test_a_shard_that_failed_half_way_is_the_same_when_tried_again(
    last_read: int,
    monkeypatch: pytest.MonkeyPatch,
    large: MergePlan,
    reference: Path,
    out: Path,
    held: contextlib.ExitStack,
) -> None:
    sealed = seal(large)
    holder = held.enter_context(claim(sealed, locate(out), overwrite=False, say=unheard))
    assert holder is not None
    assembly = Assembly(sealed, locate(out), holder.run)
    worker = ShardWorker(sealed, locate(out), "cpu", choice=TWO_LANES)
    (biggest,) = (shard.index for shard in sealed.shards if shard.size > 1_000_000)
    reads = itertools.count()
    read = RangeReader.read_into

    def failing(self: RangeReader, *args: Any) -> memoryview:
        if next(reads) == last_read:
            raise StorageError("the disk is gone")
        return read(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(RangeReader, "read_into", failing)
        with pytest.raises(StorageError, match="the disk is gone"):
            worker.merge(biggest, 1, ignore_progress)
    assert not list(out.glob(".raymeld/parts/*"))

    for shard in range(len(sealed.shards)):
        assembly.accept(worker.merge(shard, 2, ignore_progress))
    worker.close()
    assembly.write_record()
    assembly.publish({})
    assert published(out) == published(reference)


def digests(out: Path) -> dict[str, str]:
    return {row["tensor"]: row["digest"] for row in ledger(out)}


def ledger(out: Path) -> list[dict[str, Any]]:
    with (out / ".raymeld" / "ledger.parquet").open("rb") as file:
        return list(pq.ParquetFile(file).read().to_pylist())


def test_the_ledger_holds_the_digest_of_every_tensor_in_the_files(reference: Path) -> None:
    found = {}
    for path in reference.glob("*.safetensors"):
        content, header = path.read_bytes(), header_of(path)
        data = content[8 + int.from_bytes(content[:8], "little") :]
        for name in header.keys() - {"__metadata__"}:
            begin, end = header[name]["data_offsets"]
            found[name] = data[begin:end]

    assert digests(reference) == {name: bytes_digest(data) for name, data in found.items()}
    assert digests(reference) == {name: naive_digest(data) for name, data in found.items()}


def test_the_ledger_says_what_happened_to_every_tensor(
    reference: Path, large: MergePlan, tensors: dict[str, torch.Tensor]
) -> None:
    deltas = deltas_of(FACTORS, 7 / 5)
    rows = {row["tensor"]: row for row in ledger(reference)}

    assert rows.keys() == tensors.keys()
    for name, row in rows.items():
        tensor = tensors[name]
        assert row["action"] == ("merged" if name in deltas else "copied")
        assert row["shape"] == list(tensor.shape)
        assert row["nbytes"] == row["bytes_read"] == row["bytes_written"] == tensor.nbytes
        assert (row["worker"], row["device"], row["attempt"]) == ("inline", "cpu", 1)
        assert row["file"] == large.shards[row["shard"]].name
        assert min(row["read_seconds"], row["merge_seconds"], row["write_seconds"]) > 0
        figures = [row[k] for k in ("base_norm", "delta_norm", "largest_change", "relative_change")]
        if name not in deltas:
            assert figures == [None] * 4
            continue
        delta = deltas[name][0].product(torch.float64)
        base_norm, delta_norm = (float(torch.linalg.norm(t)) for t in (tensor.double(), delta))
        expected = [base_norm, delta_norm, float(delta.abs().max()), delta_norm / base_norm]
        assert figures == pytest.approx(expected, rel=1e-4)


def test_the_ledger_says_what_was_converted(tmp_path: Path, out: Path) -> None:
    geometry = Geometry(layers=1)
    base = write_base(tmp_path / "base", random_tensors(geometry, torch.float32), geometry.config)
    factors = random_factors(geometry.linear, {"model.layers.0.self_attn.q_proj": 2})
    adapter = write_adapter(tmp_path / "adapter", factors, r=2)

    merge(make_plan(base, [adapter], dtype="bfloat16"), out)

    rows = {row["tensor"]: row for row in ledger(out)}
    assert {row["dtype"] for row in rows.values()} == {"BF16"}
    merged = {name for name, row in rows.items() if row["action"] == "merged"}
    assert merged == {"model.layers.0.self_attn.q_proj.weight"}
    assert {row["action"] for name, row in rows.items() if name not in merged} == {"converted"}
    norm = rows["model.norm.weight"]
    assert (norm["bytes_read"], norm["bytes_written"]) == (4 * 32, 2 * 32)

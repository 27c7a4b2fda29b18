"""Lanes from the memory found, what happens when it runs out, and what ends a merge midway."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from handmade import (
    Geometry,
    assert_no_checkpoint,
    published,
    random_factors,
    random_tensors,
    write_adapter,
    write_base,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from merge_core.blocks import block_rows, blocks_over, largest_block
from merge_core.errors import DeviceMemoryError, NonFiniteError, StorageError
from merge_core.kernel import MergeKernel
from merge_core.memory import LaneChoice, Memory, choose_lanes, lane_need
from merge_core.merge import merge
from merge_core.plan import MergePlan
from merge_core.planner import make_plan
from merge_core.progress import Progress

GEOMETRY = Geometry()
FACTORS = random_factors(GEOMETRY.linear, dict.fromkeys(GEOMETRY.linear, 4))
GATE = "model.layers.1.mlp.gate_proj"
FOUR_LANES = LaneChoice(lanes=4, read_bytes=1 << 20, reason="the test says so")
MIB = 1 << 20


def made(
    path: Path,
    tensors: dict[str, torch.Tensor] | None = None,
    factors: dict[str, tuple[torch.Tensor, torch.Tensor]] | None = None,
    **options: Any,
) -> MergePlan:
    base = write_base(path / "base", tensors or random_tensors(GEOMETRY), GEOMETRY.config)
    adapter = write_adapter(path / "adapter", factors or FACTORS, r=4, lora_alpha=8)
    return make_plan(base, [adapter], shard_bytes=18_000, **options)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> MergePlan:
    return made(tmp_path_factory.mktemp("memory"))


def host_need(lanes: int, read_bytes: int) -> int:
    """Per lane two buffers with their slack, two float32 blocks of 48 x 32 and a tensor's factors;
    and the factors of one tensor more."""
    return lanes * (2 * (read_bytes + 8192) + 2 * 4 * 48 * 32) + (lanes + 1) * 4 * 4 * (48 + 32)


def just_enough(need: int) -> int:
    return math.ceil(need / 0.8)


def test_what_lanes_need_is_buffers_blocks_and_factors(small: MergePlan) -> None:
    need = lane_need(small, "cpu", MIB)

    assert (need.inbox, need.outbox) == (MIB + 8192, MIB + 8192)
    assert (need.scratch, need.factors) == (12_288, 1_280)
    assert need.on_host(4, "cpu") == host_need(4, MIB)
    assert need.on_host(4, "cuda") == host_need(4, MIB) - 4 * 12_288
    assert need.on_device(4) == host_need(4, MIB)


def test_a_wider_base_needs_a_larger_inbox(tmp_path: Path) -> None:
    plan = made(tmp_path, random_tensors(GEOMETRY, torch.float32), dtype="bfloat16")

    assert lane_need(plan, "cpu", MIB).inbox == 2 * MIB + 8192
    assert lane_need(plan, "cpu", MIB).outbox == MIB + 8192


STEPS = [(4, 8), (4, 4), (4, 2), (4, 1), (3, 1), (2, 1), (1, 2), (1, 1)]
"""Lanes and MiB a read, as memory shrinks."""


@pytest.mark.parametrize("place", range(len(STEPS)))
def test_the_memory_decides_and_smaller_reads_come_before_fewer_lanes(
    small: MergePlan, place: int
) -> None:
    lanes, mebibytes = STEPS[place]
    host = just_enough(host_need(lanes, mebibytes * MIB))
    chosen = choose_lanes(small, "cpu", Memory(host=host, device=None), most=4)
    assert (chosen.lanes, chosen.read_bytes) == (lanes, mebibytes * MIB)

    less = Memory(host=host - 2, device=None)
    if place == len(STEPS) - 1:
        with pytest.raises(DeviceMemoryError):
            choose_lanes(small, "cpu", less, most=4)
    else:
        chosen = choose_lanes(small, "cpu", less, most=4)
        assert (chosen.lanes, chosen.read_bytes // MIB) == STEPS[place + 1]


def test_the_choice_says_what_it_needs_and_found(small: MergePlan) -> None:
    found = Memory(host=10**9, device=20_000_000)
    chosen = choose_lanes(small, "cuda", found, most=4)

    assert (chosen.lanes, chosen.read_bytes) == (4, MIB)
    assert chosen.reason == (
        "4 lanes of 1 MiB reads need 8 MB of memory and 9 MB of VRAM;"
        " found free: 1,000 MB of memory and 20 MB of VRAM"
    )


@pytest.mark.parametrize(("spare", "wanted"), [(0, (4, 2 * MIB)), (-1, (4, MIB))])
def test_vram_limits_the_reads_however_much_memory_there_is(
    small: MergePlan, spare: int, wanted: tuple[int, int]
) -> None:
    vram = just_enough(lane_need(small, "cuda", 2 * MIB).on_device(4)) + spare
    chosen = choose_lanes(small, "cuda", Memory(host=10**12, device=vram), most=4)

    assert (chosen.lanes, chosen.read_bytes) == wanted


def test_no_more_lanes_than_asked_for(small: MergePlan) -> None:
    assert choose_lanes(small, "cpu", Memory(host=10**12, device=None), most=2).lanes == 2


@pytest.mark.parametrize(
    ("device", "vram", "needed", "found"),
    [
        ("cpu", None, "2 MB of memory", "1 MB of memory"),
        ("cuda", 10**6, "2 MB of memory and 2 MB of VRAM", "1 MB of memory and 1 MB of VRAM"),
        ("cuda", 10**9, "2 MB of memory and 2 MB of VRAM", "1 MB of memory and 1,000 MB of VRAM"),
    ],
)
def test_too_little_memory_is_refused_with_both_numbers(
    small: MergePlan, device: str, vram: int | None, needed: str, found: str
) -> None:
    with pytest.raises(DeviceMemoryError) as caught:
        choose_lanes(small, device, Memory(host=1_000_000, device=vram))

    assert caught.value.what == f"one lane needs {needed}, found free: {found}"
    assert caught.value.where == device


def out_of_memory(monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    calls, real = itertools.count(), MergeKernel.merge

    def run(self: MergeKernel, *args: Any) -> Any:
        if next(calls) < times:
            raise torch.OutOfMemoryError("no room on the device")
        return real(self, *args)

    monkeypatch.setattr(MergeKernel, "merge", run)


def test_running_out_of_memory_takes_a_third_of_the_lanes_and_ends_in_the_same_bytes(
    small: MergePlan, tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge(small, tmp_path / "calm", choice=FOUR_LANES)
    out_of_memory(monkeypatch, 1)
    result = merge(small, out, choice=FOUR_LANES)

    tried = {r.attempt: r.lanes for r in result.receipts if r.attempt > 1}
    assert tried == {2: "1 lane instead of 4 after running out of memory"}
    assert published(out) == published(tmp_path / "calm")


def test_running_out_of_memory_three_times_ends_the_merge_without_a_trace(
    small: MergePlan, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out_of_memory(monkeypatch, 10**9)

    with pytest.raises(DeviceMemoryError, match="no room on the device"):
        merge(small, out, choice=FOUR_LANES)

    assert_no_checkpoint(out)


def spoiled_base(value: float) -> dict[str, torch.Tensor]:
    tensors = random_tensors(GEOMETRY)
    tensors[f"{GATE}.weight"][7, 3] = value
    return tensors


def overflowing() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    a, b = (factor.clone() for factor in FACTORS[GATE])
    a[:, 3], b[7] = 100.0, 100.0  # 4 * 100 * 100 * 2 > 65504, in one place alone
    return {**FACTORS, GATE: (a, b)}


@pytest.mark.parametrize(
    ("tensors", "factors", "said"),
    [
        (spoiled_base(math.inf), FACTORS, "row 7, column 3 is inf"),
        (spoiled_base(math.nan), FACTORS, "row 7, column 3 is nan"),
        (random_tensors(GEOMETRY, torch.float16), overflowing(), "row 7, column 3 is inf"),
    ],
    ids=["inf in the base", "NaN in the base", "float16 overflow"],
)
def test_a_result_that_is_no_number_names_tensor_and_row_and_publishes_nothing(
    tmp_path: Path, out: Path, tensors: Any, factors: Any, said: str
) -> None:
    plan = made(tmp_path, tensors, factors)

    with pytest.raises(NonFiniteError) as caught:
        merge(plan, out, choice=FOUR_LANES)

    assert (caught.value.where, caught.value.what) == (f"tensor {GATE}.weight", said)
    assert caught.value.exit_code == 1
    assert_no_checkpoint(out)


@settings(max_examples=300, derandomize=True, deadline=None)
@given(
    rows=st.integers(1, 30_000),
    width=st.integers(1, 9_000),
    device=st.sampled_from(["cpu", "cuda"]),
    ends=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
def test_blocks_cover_every_row_once_and_are_never_short(
    rows: int, width: int, device: str, ends: tuple[float, float]
) -> None:
    every = list(blocks_over(rows, width, device, 0, rows * width))
    heights = [bottom - top for top, bottom in every]
    block = block_rows(width, device)

    assert [row for pair in every for row in pair][1:-1:2] == [top for top, _ in every[1:]]
    assert (every[0][0], every[-1][1]) == (0, rows)
    assert block >= 64
    assert block % 16 == 0
    assert heights[:-1] == [block] * (len(heights) - 1)
    assert heights[-1] >= min(block, rows)
    assert heights[-1] < 2 * block
    assert largest_block(rows, width, device) == max(heights) * width

    first, behind = sorted(int(end * (rows * width - 1)) for end in ends)
    behind += 1
    assert list(blocks_over(rows, width, device, first, behind)) == [
        (top, bottom) for top, bottom in every if top * width < behind and bottom * width > first
    ]


def test_a_merge_leaves_torchs_threads_and_precision_as_they_were(
    small: MergePlan, out: Path
) -> None:
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    torch.set_num_threads(3)
    torch.set_float32_matmul_precision("high")
    try:
        merge(small, out, choice=FOUR_LANES)
        after = torch.get_num_threads(), torch.get_float32_matmul_precision()
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)

    assert after == (3, "high")


def touching(path: Path, phase: str) -> Callable[[Progress], None]:
    def watch(progress: Progress) -> None:
        if progress.phase == phase:
            os.utime(path, ns=(0, 12345))

    return watch


@pytest.mark.parametrize("phase", ["merging", "verifying"])
@pytest.mark.parametrize(
    "name", ["base/model.safetensors", "base/tokenizer.json", "adapter/adapter_model.safetensors"]
)
def test_an_input_replaced_during_the_merge_is_named_and_nothing_is_published(
    tmp_path: Path, out: Path, name: str, phase: str
) -> None:
    plan = made(tmp_path)

    with pytest.raises(StorageError, match="changed while it was being merged") as caught:
        merge(plan, out, choice=FOUR_LANES, watch=touching(tmp_path / name, phase))

    assert caught.value.where == str(tmp_path / name)
    assert_no_checkpoint(out)


def test_a_config_json_replaced_after_the_plan_is_not_published(tmp_path: Path, out: Path) -> None:
    plan = made(tmp_path)
    (tmp_path / "base" / "config.json").write_text('{"model_type": "another"}')

    with pytest.raises(StorageError, match=r"config\.json"):
        merge(plan, out, choice=FOUR_LANES)

    assert_no_checkpoint(out)

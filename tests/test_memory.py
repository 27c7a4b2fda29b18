"""Lanes from the memory found, and what happens when it runs out."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from handmade import (
    FACTORS,
    FOUR_LANES,
    GEOMETRY,
    assert_no_checkpoint,
    keyed,
    published,
    random_tensors,
    small_merge,
    write_adapter,
    write_base,
)
from safetensors.torch import save_file

from merge_core.errors import DeviceMemoryError
from merge_core.kernel import MergeKernel
from merge_core.memory import Memory, choose_lanes, lane_need
from merge_core.merge import merge
from merge_core.plan import MergePlan
from merge_core.planner import make_plan

MIB = 1 << 20


def host_need(lanes: int, read_bytes: int) -> int:
    """Per lane two buffers with their slack, two float32 blocks of 48 x 32 and a tensor's factors;
    and the factors of one tensor more."""
    return lanes * (2 * (read_bytes + 8192) + 2 * 4 * 48 * 32) + (lanes + 1) * 4 * 4 * (48 + 32)


def just_enough(need: int) -> int:
    return math.ceil(need / 0.8)


def test_what_lanes_need_is_buffers_blocks_and_factors(small: MergePlan) -> None:
    need = lane_need(small, "cpu", MIB)

    assert (need.inbox, need.outbox) == (MIB + 8192, MIB + 8192)
    assert (need.block, need.scratch, need.factors) == (48 * 32, 2, 1_280)
    assert need.on_host(4, "cpu") == host_need(4, MIB)
    assert need.on_host(4, "cuda") == host_need(4, MIB) - 4 * 12_288
    assert need.on_device(4) == host_need(4, MIB)


def test_dora_needs_whole_rows_and_twice_the_blocks(tmp_path: Path) -> None:
    tensors, factors = random_tensors(GEOMETRY), FACTORS
    base = write_base(tmp_path / "base", tensors, GEOMETRY.config)
    magnitudes = {
        f"base_model.model.{module}.lora_magnitude_vector": torch.ones(len(b))
        for module, (_, b) in factors.items()
    }
    path = write_adapter(tmp_path / "adapter", factors, r=4, use_dora=True)
    save_file({**keyed(factors), **magnitudes}, path / "adapter_model.safetensors")

    need = lane_need(make_plan(base, [path]), "cpu", MIB)

    assert (need.block, need.scratch) == (48 * 32, 4)
    assert need.factors == 4 * (4 * (48 + 32) + 48)  # and a magnitude for each of 48 outputs
    assert need.inbox == MIB + 2 * 48 * 2 + 8192  # the rest of the rows at both ends of a piece


def test_dora_on_embeddings_needs_blocks_to_sum_up_columns(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", random_tensors(GEOMETRY), GEOMETRY.config)
    path = write_adapter(tmp_path / "adapter", {}, r=4, use_dora=True)
    module = "base_model.model.model.embed_tokens"
    trained = {"embedding_A": torch.ones(4, 80), "embedding_B": torch.ones(32, 4)}
    trained |= {"magnitude_vector": torch.ones(32)}
    save_file(
        {f"{module}.lora_{name}": tensor for name, tensor in trained.items()},
        path / "adapter_model.safetensors",
    )

    need = lane_need(make_plan(base, [path]), "cpu", MIB)

    assert need.factors == 4 * (4 * (80 + 32) + 32) + 32 * 80 * 32


def test_a_wider_base_needs_a_larger_inbox(tmp_path: Path) -> None:
    plan = small_merge(tmp_path, random_tensors(GEOMETRY, torch.float32), dtype="bfloat16")

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

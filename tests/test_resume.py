"""The same command again: what is done is proven, what is missing is merged, no byte differs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from aftermath import assert_tidy
from handmade import (
    TWO_LANES,
    Geometry,
    published,
    random_factors,
    random_tensors,
    write_adapter,
    write_base,
)
from kills import Kill, command, marked
from leases import move_elsewhere, take, take_over

from merge_core import commit, lease
from merge_core.errors import InputError, LeaseLostError, RaymeldError
from merge_core.lease import Lease
from merge_core.merge import MergeResult, merge
from merge_core.plan import MergePlan
from merge_core.planner import make_plan
from merge_core.progress import Progress
from merge_core.stores.location import locate

GEOMETRY = Geometry()
SHARD_BYTES = 18_000


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> MergePlan:
    path = tmp_path_factory.mktemp("resume")
    base = write_base(path / "base", random_tensors(GEOMETRY), GEOMETRY.config, files=2)
    factors = random_factors(GEOMETRY.linear, dict.fromkeys(GEOMETRY.linear, 4))
    adapter = write_adapter(path / "adapter", factors, r=4, lora_alpha=8)
    return make_plan(base, [adapter], shard_bytes=SHARD_BYTES)


@pytest.fixture(scope="module")
def expected(plan: MergePlan, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("reference") / "out"
    merge(plan, out, choice=TWO_LANES)
    return published(out)


@pytest.fixture
def stopped(plan: MergePlan, out: Path) -> Path:
    """OUT of a merge that ended with two of its shards done."""
    stop_when(plan, out, lambda p: p.done > sum(s.size for s in plan.shards[:2]))
    assert len(list((out / ".raymeld" / "receipts").iterdir())) == 2
    return out


def stop_when(plan: MergePlan, out: Path, stop: Callable[[Progress], bool]) -> None:
    def watch(progress: Progress) -> None:
        if stop(progress):
            raise RaymeldError("stopped")

    with pytest.raises(RaymeldError, match="stopped"):
        merge(plan, out, choice=TWO_LANES, watch=watch)


def go_on(plan: MergePlan, out: Path) -> MergeResult:
    return merge(plan, out, choice=TWO_LANES)


def test_finished_shards_are_proven_and_not_merged_again(
    plan: MergePlan, expected: dict[str, bytes], stopped: Path
) -> None:
    done = [stopped / shard.name for shard in plan.shards[:2]]
    times = [path.stat().st_mtime_ns for path in done]

    result = go_on(plan, stopped)

    assert result.resumed == 2
    assert [receipt.shard for receipt in result.receipts] == list(range(len(plan.shards)))
    assert published(stopped) == expected
    assert [path.stat().st_mtime_ns for path in done] == times


def flip_last_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        flip_last_bit,
        Path.unlink,
        lambda path: os.truncate(path, path.stat().st_size - 1),
        lambda path: path.write_bytes(b""),
    ],
    ids=["a bit flipped", "gone", "shorter", "empty"],
)
def test_a_finished_shard_that_is_damaged_is_merged_again(
    plan: MergePlan, expected: dict[str, bytes], stopped: Path, damage: Callable[[Path], object]
) -> None:
    damage(stopped / plan.shards[1].name)

    assert go_on(plan, stopped).resumed == 1
    assert published(stopped) == expected


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"shard": 1}', "another plan"])
def test_a_receipt_that_cannot_be_believed_counts_as_none(
    plan: MergePlan, expected: dict[str, bytes], stopped: Path, text: str
) -> None:
    receipt = stopped / ".raymeld" / "receipts" / "shard-00001.json"
    if text == "another plan":
        text = json.dumps({**json.loads(receipt.read_bytes()), "fingerprint": "0" * 64})
    receipt.write_text(text)

    assert go_on(plan, stopped).resumed == 1
    assert published(stopped) == expected


def test_what_another_version_began_is_refused(plan: MergePlan, stopped: Path) -> None:
    path = stopped / ".raymeld" / "plan.json"
    path.write_text(json.dumps({**json.loads(path.read_bytes()), "raymeld": "0.0.9"}))

    with pytest.raises(InputError, match=r"an unfinished merge by raymeld 0\.0\.9"):
        go_on(plan, stopped)


def test_overwrite_starts_from_the_beginning(
    plan: MergePlan, expected: dict[str, bytes], stopped: Path
) -> None:
    result = merge(plan, stopped, choice=TWO_LANES, overwrite=True)

    assert result.resumed == 0
    assert published(stopped) == expected


def test_a_merge_that_stopped_after_its_verification_failed_goes_on(
    plan: MergePlan, expected: dict[str, bytes], out: Path
) -> None:
    stop_when(plan, out, lambda p: p.phase == "verifying")
    flip_last_bit(out / plan.shards[-1].name)

    assert go_on(plan, out).resumed == len(plan.shards) - 1
    assert published(out) == expected


@pytest.mark.parametrize(
    ("place", "call", "resumed"),
    [
        ("before merge_core.claim:prepare", 1, 0),
        ("before merge_core.output:describe", 1, 0),
        ("before merge_core.worker:ShardWorker.merge", 1, 0),
        ("before merge_core.commit:Assembly.accept", 2, 1),
        ("before merge_core.commit:Assembly._publish_shard", 2, 2),
        ("before merge_core.commit:Assembly._check_header", 3, 3),
        ("before merge_core.commit:Assembly.write_record", 1, 4),
        ("before merge_core.commit:Assembly._write_side_files", 1, 4),
        ("before merge_core.commit:Assembly.publish", 1, 4),
    ],
)
def test_a_merge_that_was_killed_goes_on_wherever_it_was(
    plan: MergePlan,
    expected: dict[str, bytes],
    out: Path,
    tmp_path: Path,
    place: str,
    call: int,
    resumed: int,
) -> None:
    ahead = marked([Kill(victim="driver", place=place, call=call)], tmp_path / "marks")
    words = [plan.base, plan.adapters[0].path, "--out", out, "--address", "inline"]
    words += ["--shard-size", SHARD_BYTES, "--device", "cpu"]
    died = subprocess.run(command(ahead, "merge", *words), capture_output=True, text=True)
    assert died.returncode == -signal.SIGKILL, died.stderr
    assert not (out / "config.json").exists()

    result = go_on(plan, out)

    assert result.resumed == resumed
    assert published(out) == expected
    assert_tidy(out)


def test_what_a_machine_left_that_died_right_after_the_commit_is_removed(
    plan: MergePlan, out: Path, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as dying:
        dying.setattr(commit, "remove_leftovers", lambda _: None)
        merge(plan, out, choice=TWO_LANES)
    receipts = out / ".raymeld" / "receipts"
    with Lease(locate(out), lambda _: None):
        assert not merge(plan, out, choice=TWO_LANES).receipts
        assert receipts.exists()  # whoever is at work may be about to begin anew

    assert not merge(plan, out, choice=TWO_LANES).receipts

    assert_tidy(out)
    assert published(out) == expected


def test_a_second_merge_into_the_same_directory_is_refused(plan: MergePlan, out: Path) -> None:
    before: set[Path] = set()
    with take(out):
        before = set(out.rglob("*"))
        with pytest.raises(InputError, match="is merging into it"):
            go_on(plan, out)
        assert set(out.rglob("*")) == before


def test_a_merge_that_is_finished_while_another_waits_for_its_lease_is_not_done_again(
    plan: MergePlan, expected: dict[str, bytes], out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[str] = []
    first = take(out)
    move_elsewhere(out)

    def finish(line: str) -> None:
        heard.append(line)
        first.release()
        assert len(go_on(plan, out).receipts) == len(plan.shards)

    monkeypatch.setattr(lease, "LOOK_SECONDS", 0.001)
    result = merge(plan, out, choice=TWO_LANES, say=finish)

    assert len(heard) == 1
    assert result.receipts == ()
    assert published(out) == expected


def test_a_merge_whose_lease_was_taken_over_publishes_nothing_more(
    plan: MergePlan, expected: dict[str, bytes], out: Path
) -> None:
    """It slept, say, and another one took its place: both end, one with the result."""
    taken: list[Lease] = []

    def watch(progress: Progress) -> None:
        if progress.phase == "merging" and progress.done > plan.shards[0].size and not taken:
            taken.append(take_over(out))

    with pytest.raises(LeaseLostError, match="another merge has taken OUT over"):
        merge(plan, out, choice=TWO_LANES, watch=watch)

    assert (out / plan.shards[0].name).exists()
    assert not (out / plan.shards[1].name).exists()
    taken[0].release()
    assert go_on(plan, out).resumed == 1
    assert published(out) == expected

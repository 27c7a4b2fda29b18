"""An input that changes after the plan, or during the merge, is named and nothing is published."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from handmade import FOUR_LANES, assert_no_checkpoint, small_merge

from merge_core.errors import StorageError
from merge_core.merge import merge
from merge_core.planner import make_plan
from merge_core.progress import Progress
from merge_core.stores import inodes


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
    plan = small_merge(tmp_path)

    with pytest.raises(StorageError, match="changed while it was being merged") as caught:
        merge(plan, out, choice=FOUR_LANES, watch=touching(tmp_path / name, phase))

    assert caught.value.where == str(tmp_path / name)
    assert_no_checkpoint(out)


def test_a_config_json_replaced_after_the_plan_is_not_published(tmp_path: Path, out: Path) -> None:
    plan = small_merge(tmp_path)
    (tmp_path / "base" / "config.json").write_text('{"model_type": "another"}')

    with pytest.raises(StorageError, match=r"config\.json"):
        merge(plan, out, choice=FOUR_LANES)

    assert_no_checkpoint(out)


def replace_alike(path: Path) -> None:
    """By another file of the same size and times, as from another archive."""
    before, other = path.stat(), path.with_name("other")
    other.write_bytes(path.read_bytes()[:-1] + b"?")
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.rename(path)


@pytest.mark.parametrize("phase", ["before", "merging", "verifying"])
def test_a_file_that_another_of_the_same_size_and_time_replaces_is_noticed(
    tmp_path: Path, out: Path, phase: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inodes, "_file_system", lambda _: "ext4")
    plan, path = small_merge(tmp_path), tmp_path / "base" / "model.safetensors"
    waiting = [path]

    def watch(progress: Progress) -> None:
        if progress.phase == phase and waiting:
            replace_alike(waiting.pop())

    if phase == "before":
        replace_alike(path)
    with pytest.raises(StorageError, match="changed while it was being merged") as caught:
        merge(plan, out, choice=FOUR_LANES, watch=watch)

    assert caught.value.where == str(path)
    assert_no_checkpoint(out)


@pytest.mark.parametrize("elsewhere", ["machine", "device", "fuse.sshfs", "overlay", None])
def test_a_copy_on_another_machine_or_mount_is_the_same_file(
    tmp_path: Path, out: Path, elsewhere: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with a base that each node has on a disk of its own, with its times."""
    kinds = {elsewhere} if elsewhere not in ("machine", "device") else {"ext4"}
    monkeypatch.setattr(inodes, "_file_system", lambda _: next(iter(kinds)))
    plan, path = small_merge(tmp_path), tmp_path / "base" / "model.safetensors"
    if elsewhere == "machine":
        monkeypatch.setattr(inodes, "_boot", lambda: "another")
    if elsewhere == "device":
        monkeypatch.setattr(os, "minor", lambda _: 12345)
    copy = path.with_name("other")
    shutil.copy2(path, copy)
    copy.rename(path)

    merge(plan, out, choice=FOUR_LANES)
    again = merge(make_plan(tmp_path / "base", [tmp_path / "adapter"], shard_bytes=18_000), out)

    assert again.receipts == ()  # it is done: no pin has changed


def test_the_kind_of_a_mount_is_read_off_the_kernels_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mounts = tmp_path / "mountinfo"
    mounts.write_text(
        "25 1 254:0 / / rw,relatime - ext4 /dev/vda rw\n"
        "26 25 0:49 / /mnt rw shared:1 master:2 - fuse.sshfs far: rw\n"
    )
    monkeypatch.setattr(inodes, "_MOUNTS", mounts)
    inodes._file_system.cache_clear()
    assert [inodes._file_system(one) for one in ("254:0", "0:49", "9:9")] == [
        "ext4",
        "fuse.sshfs",
        None,
    ]
    monkeypatch.setattr(inodes, "_MOUNTS", tmp_path / "none")
    inodes._file_system.cache_clear()
    assert inodes.inode_of(os.stat(tmp_path)) == ""
    inodes._file_system.cache_clear()

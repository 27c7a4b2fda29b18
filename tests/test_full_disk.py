"""A disk without room: noticed before the merge, or midway without a part left behind."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from handmade import Geometry, assert_no_checkpoint, random_tensors, write_base
from scenes import BaseScene

from merge_core.errors import StorageError


def promise_space(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))


def test_a_disk_that_is_too_small_is_noticed_before_anything_is_written(
    scene: BaseScene, monkeypatch: pytest.MonkeyPatch
) -> None:
    promise_space(monkeypatch, free=100)
    with pytest.raises(StorageError, match="no space: the result takes") as caught:
        scene.merge()
    assert caught.value.exit_code == 1
    assert not scene.out.exists()


@pytest.fixture
def tiny_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Path]]:
    """A file system of the given size that claims to have room for everything."""
    if os.geteuid() != 0:
        pytest.skip("only root may mount")
    disk = tmp_path / "disk"
    disk.mkdir()
    promise_space(monkeypatch, free=10**12)

    def mount(size: str) -> Path:
        options = f"remount,size={size}" if disk.is_mount() else f"size={size}"
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", disk]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"mount: {done.stderr.strip()}")
        return disk

    try:
        yield mount
    finally:
        if disk.is_mount():
            subprocess.run(["umount", disk], check=True)


def test_a_disk_that_fills_up_under_the_shards_leaves_no_part(
    scene: BaseScene, tmp_path: Path, tiny_disk: Callable[[str], Path]
) -> None:
    wide = Geometry(layers=1, vocab=4000)
    scene.base = write_base(tmp_path / "wide", random_tensors(wide), wide.config)
    scene.out = tiny_disk("256k") / "out"
    with pytest.raises(StorageError, match="No space left on device") as caught:
        scene.merge()
    assert caught.value.exit_code == 1
    assert "Free space" in str(caught.value)
    assert_no_checkpoint(scene.out)
    assert not list(scene.out.rglob("*.safetensors"))


def test_a_disk_that_fills_up_under_the_plan_can_be_used_again_when_it_has_room(
    scene: BaseScene, tiny_disk: Callable[[str], Path]
) -> None:
    scene.out = tiny_disk("8k") / "out"
    with pytest.raises(StorageError, match="No space left on device"):
        scene.merge()
    assert_no_checkpoint(scene.out)
    tiny_disk("4m")
    assert scene.merge(overwrite=True).receipts
    assert (scene.out / "config.json").exists()

"""What a power loss, or a disk that fills up, leaves in OUT. Skipped where nobody may mount."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from handmade import TWO_LANES, published
from leases import age, lease_directory
from small_disk import SmallDisk, small_disk

from merge_core.errors import StorageError
from merge_core.lease import LEASE_SECONDS
from merge_core.merge import merge
from merge_core.plan import MergePlan
from merge_core.progress import Progress


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    try:
        with small_disk(tmp_path) as mounted:
            yield mounted
    except PermissionError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def expected(small: MergePlan, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("reference") / "out"
    merge(small, out, choice=TWO_LANES)
    return published(out)


class Steps:
    """Counts what makes files durable or gives them their names, and fails before one of them."""

    def __init__(self, patch: pytest.MonkeyPatch, fail: Callable[[], None]) -> None:
        self.left: int | None = None
        """Until power is lost; None: it is not."""
        self.taken = 0
        self._fail = fail
        for name in ("fsync", "rename", "link"):
            patch.setattr(os, name, self._counted(getattr(os, name)))

    def _counted(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def step(*arguments: Any, **named: Any) -> Any:
            self.taken += 1
            if self.left is not None:
                self.left -= 1
                if self.left < 0:
                    self.left = None
                    self._fail()
            return call(*arguments, **named)

        return step


def test_a_power_loss_before_any_step_leaves_nothing_half_done_and_the_same_command_ends_it(
    small: MergePlan, disk: SmallDisk, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = Steps(monkeypatch, disk.lose_power)
    merge(small, disk.path / "whole", choice=TWO_LANES)
    all_steps = steps.taken
    assert all_steps > 20

    for number in range(all_steps):
        out = disk.path / f"out-{number}"
        steps.left = number
        with contextlib.suppress(StorageError):  # of the last steps nobody needs to hear
            merge(small, out, choice=TWO_LANES)
        assert steps.left is None
        disk.restart()

        if (out / "config.json").exists():
            assert published(out) == expected
        if lease_directory(out).exists() and any(lease_directory(out).iterdir()):
            age(out, LEASE_SECONDS + 1)  # a machine takes that long to start anew
        merge(small, out, choice=TWO_LANES)
        assert published(out) == expected
        shutil.rmtree(out)


def test_a_disk_that_fills_up_leaves_no_checkpoint_and_the_same_command_ends_it(
    small: MergePlan, disk: SmallDisk, expected: dict[str, bytes]
) -> None:
    out, ballast = disk.path / "out", disk.path / "ballast"

    def fill(progress: Progress) -> None:
        if progress.done and not ballast.exists():
            disk.fill(ballast)

    with pytest.raises(StorageError, match="No space left"):
        merge(small, out, choice=TWO_LANES, watch=fill)

    assert not (out / "config.json").exists()
    ballast.unlink()
    merge(small, out, choice=TWO_LANES)
    assert published(out) == expected

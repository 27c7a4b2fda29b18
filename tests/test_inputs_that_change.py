"""An input that changes after the plan, or during the merge, is named and nothing is published."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from handmade import FOUR_LANES, assert_no_checkpoint, small_merge

from merge_core.errors import StorageError
from merge_core.merge import merge
from merge_core.progress import Progress


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

"""What the numeric comparison does with adapters that PEFT's own layers merge."""

from __future__ import annotations

from pathlib import Path

import pytest
from merged_by_hand import found
from test_verify_kinds import plant
from tuners import make_tuned

from merge_core.errors import InputError
from merge_core.merge import merge
from merge_core.planner import make_plan
from merge_core.verify import verify

Q, NORM = "model.layers.0.self_attn.q_proj.weight", "model.norm.weight"
K = "model.layers.1.self_attn.k_proj.weight"


@pytest.mark.parametrize(("kind", "tensors"), [("SHIRA", 10), ("VERA", 10), ("KASA", 10)])
def test_the_report_names_what_is_left_to_the_digests(
    kind: str, tensors: int, base: Path, tmp_path: Path
) -> None:
    adapter, out = make_tuned(tmp_path / "adapter", base, kind), tmp_path / "out"
    merge(make_plan(base, [adapter], shard_bytes=70_000), out, level="numeric")

    report = verify(out, "numeric")

    assert report.ok
    left = f"left to the digest: {tensors} tensors of layers that PEFT merged, model.layers.0."
    assert any(line.startswith(left) for line in report.checks)
    assert report.checks[-1].startswith("every other value compared")


def test_what_else_differs_is_found(base: Path, tmp_path: Path) -> None:
    adapter, out = make_tuned(tmp_path / "adapter", base, "LOHA"), tmp_path / "out"
    merge(make_plan(base, [adapter]), out)
    plant(out, Q, 3)
    plant(out, K, 5)

    places = found(out, "numeric")

    assert [check for check, where in places if Q in where] == ["digest"]
    assert [check for check, where in places if K in where] == ["digest", "copied"]
    assert len(places) == 3


def test_trained_norms_are_compared(base: Path, tmp_path: Path) -> None:
    adapter, out = make_tuned(tmp_path / "adapter", base, "LN_TUNING"), tmp_path / "out"
    merge(make_plan(base, [adapter]), out)
    assert verify(out, "numeric").ok
    assert not any("left to the digest" in line for line in verify(out, "numeric").checks)
    plant(out, NORM, 3)

    assert [check for check, _ in found(out, "numeric")] == ["digest", "copied"]


def test_an_adapter_that_names_no_tensors_cannot_be_checked(base: Path, tmp_path: Path) -> None:
    adapter = make_tuned(tmp_path / "adapter", base, "UNILORA")

    with pytest.raises(InputError, match="cannot check what its file does not name"):
        merge(make_plan(base, [adapter]), tmp_path / "out", level="numeric")

    assert not (tmp_path / "out" / "config.json").exists()

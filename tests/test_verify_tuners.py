"""What the numeric comparison does with adapters that PEFT's own layers merge."""

from __future__ import annotations

from collections.abc import Callable
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


@pytest.mark.parametrize(
    ("kind", "tensors"), [("SHIRA", 10), ("VERA", 10), ("KASA", 10), ("ADAMSS", 10)]
)
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


@pytest.mark.parametrize("keep", [False, True])
def test_a_head_that_a_tuner_unties_is_no_wrong_merge(
    keep: bool, bases: Callable[..., Path], tmp_path: Path
) -> None:
    base = bases("BF16", tie_word_embeddings=True)
    adapter = make_tuned(tmp_path / "adapter", base, "LOHA", target_modules=["lm_head"])

    merge(make_plan(base, [adapter], keep_tied=keep), tmp_path / "out", level="numeric")

    report = verify(tmp_path / "out", "numeric")
    assert report.ok
    left = "model.embed_tokens.weight" if keep else "lm_head.weight"
    words = f"left to the digest: 1 tensor of layers that PEFT merged, {left}"
    assert words in report.checks


def test_whole_tensors_beside_a_tuner_are_compared(base: Path, tmp_path: Path) -> None:
    fields = {"vocabulary": 163, "modules_to_save": ["embed_tokens", "lm_head"]}
    adapter, out = make_tuned(tmp_path / "adapter", base, "OFT", **fields), tmp_path / "out"
    merge(make_plan(base, [adapter]), out, level="numeric")
    plant(out, "lm_head.weight", 162)

    assert [check for check, _ in found(out, "numeric")] == ["digest", "copied"]


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


@pytest.mark.parametrize("fields", [{}, {"modules_to_save": ["norm"]}])
def test_an_adapter_that_names_no_tensors_cannot_be_checked(
    fields: dict[str, list[str]], base: Path, tmp_path: Path
) -> None:
    adapter = make_tuned(tmp_path / "adapter", base, "UNILORA", **fields)

    with pytest.raises(InputError, match="cannot check what its file does not name"):
        merge(make_plan(base, [adapter]), tmp_path / "out", level="numeric")

    assert not (tmp_path / "out" / "config.json").exists()

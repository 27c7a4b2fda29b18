"""Adapters on embeddings and head that are one tensor, combined as PEFT combines them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import make_adapter, read_tensors
from test_combining import combined_by_peft, weighted

from merge_core.errors import InputError
from merge_core.merge import merge
from merge_core.planner import make_plan
from merge_core.updates.combined import Combination
from merge_core.verify import verify

pytestmark = [
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied"),
    pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True` and the tied"),
]
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
METHODS: dict[str, dict[str, Any]] = {"linear": {}, "cat": {}, "svd": {}, "ties": {"density": 0.5}}


@pytest.fixture
def base(bases: Callable[..., Path]) -> Path:
    return bases("F32", shard="80KB", tie_word_embeddings=True)


def adapters_on(tmp_path: Path, base: Path, *targets: str) -> list[Path]:
    return [
        make_adapter(
            tmp_path / str(n), base, seed=n, lora_alpha=4 * n, target_modules=["q_proj", target]
        )
        for n, target in enumerate(targets, start=1)
    ]


@pytest.mark.parametrize("keep_tied", [True, False])
@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
@pytest.mark.parametrize("method", METHODS)
def test_factors_of_one_tied_end_are_combined_as_peft_does(
    base: Path,
    method: Any,
    target: str,
    keep_tied: bool,
    tmp_path: Path,
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """PEFT changes the one tensor that both ends are."""
    how = Combination(method=method, **METHODS[method])
    adapters = adapters_on(tmp_path, base, target, target)

    merge(make_plan(base, weighted(adapters), combination=how, keep_tied=keep_tied), out)

    wanted, got = combined_by_peft(base, adapters, how, monkeypatch), read_tensors(out)
    trained, other = (EMBED, HEAD) if target == "embed_tokens" else (HEAD, EMBED)
    assert (HEAD in got) == (not keep_tied)
    assert torch.allclose(got[EMBED if keep_tied else trained], wanted[EMBED], rtol=1e-4, atol=2e-6)
    if not keep_tied:
        assert torch.equal(got[other], read_tensors(base)[EMBED])
    if method == "cat":
        assert verify(out, "numeric").findings == ()


def test_factors_of_both_tied_ends_are_combined_apart(
    base: Path, tmp_path: Path, out: Path
) -> None:
    """One adapter has factors for each end: apart, a combination of one is as it is."""
    adapters = adapters_on(tmp_path, base, "embed_tokens", "lm_head")
    how = Combination(method="cat")

    merge(make_plan(base, weighted(adapters), combination=how), out)

    assert verify(out, "numeric").findings == ()


@pytest.mark.parametrize("method", METHODS)
def test_factors_of_both_tied_ends_that_stay_tied_are_refused(
    base: Path, method: Any, tmp_path: Path
) -> None:
    adapters = adapters_on(tmp_path, base, "embed_tokens", "lm_head")
    how = Combination(method=method, **METHODS[method])

    with pytest.raises(InputError, match="factors of the embeddings with those of the head"):
        make_plan(base, adapters, combination=how, keep_tied=True)

"""Finished merges written by hand are what they should be."""

from __future__ import annotations

from pathlib import Path

import torch
from merged_by_hand import raw, write_json, write_out, write_weights
from safetensors.torch import load_file

from merge_core.verify import verify


def test_safetensors_reads_what_the_builder_writes(tmp_path: Path) -> None:
    tensors = {
        "a": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3),
        "b": torch.arange(3),
        "empty": torch.zeros(0, 4),
    }

    write_weights(tmp_path / "x.safetensors", tensors)

    read = load_file(tmp_path / "x.safetensors")
    assert list(read) == sorted(tensors)
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())
    start = (tmp_path / "x.safetensors").stat().st_size - sum(len(raw(t)) for t in tensors.values())
    assert start == 4096


def test_a_checkpoint_without_anything_merged_is_right(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    write_json(base / "config.json", {"model_type": "qwen2"})
    write_weights(base / "model.safetensors", {"n": torch.ones(3), "s": torch.tensor(5)})
    out = write_out(
        tmp_path / "out", load_file(base / "model.safetensors"), base=base, adapters={}, files=1
    )

    report = verify(out, "numeric")

    assert report.findings == ()
    assert (report.files, report.tensors, report.bytes_read) == (1, 2, 3 * 20)

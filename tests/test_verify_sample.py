"""Builds merged checkpoints by hand, for the tests of ``merge_core.verify``; and tests the builder.

Nothing here uses the merge: files, index, plan and ledger are written from their descriptions.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pyarrow as pa
import torch
import xxhash
from pyarrow import parquet
from safetensors.torch import load_file

from merge_core.verify import verify

NAMES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.int64: "I64"}
Tensors = Mapping[str, torch.Tensor]


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def naive_digest(data: bytes, cell: int = 8 << 20) -> str:
    """The tensor digest as the design describes it."""
    cells = [data[start : start + cell] for start in range(0, len(data), cell)]
    return xxhash.xxh3_128(b"".join(xxhash.xxh3_128(cell).digest() for cell in cells)).hexdigest()


def write_weights(path: Path, tensors: Tensors) -> None:
    """A safetensors file whose data starts on a page."""
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in tensors.items():
        end = offset + tensor.numel() * tensor.element_size()
        fields = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape)}
        header[name] = {**fields, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % 4096)
    data = b"".join(map(raw, tensors.values()))
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def write_out(
    out: Path,
    tensors: Tensors,
    actions: Mapping[str, str] | None = None,
    *,
    base: Path,
    adapters: Mapping[Path, float],
    files: int = 2,
    config: Path | None = None,
) -> Path:
    """A finished merge holding ``tensors``; ``actions`` names those that were not just copied."""
    (out / ".raymeld").mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_bytes(((config or base) / "config.json").read_bytes())
    names = sorted(tensors)
    cut = -(-len(names) // files)
    homes, ledger = {}, []
    for number in range(files):
        file = f"model-{number + 1:05d}-of-{files:05d}.safetensors"
        file = "model.safetensors" if files == 1 else file
        held = names[number * cut : (number + 1) * cut]
        write_weights(out / file, {name: tensors[name] for name in reversed(held)})
        homes |= dict.fromkeys(held, file)
    for name in names:
        data = raw(tensors[name])
        row = {"tensor": name, "file": homes[name], "action": (actions or {}).get(name, "copied")}
        row |= {"dtype": NAMES[tensors[name].dtype], "shape": list(tensors[name].shape)}
        ledger.append({**row, "nbytes": len(data), "digest": naive_digest(data)})
    write_ledger(out, ledger)
    if files > 1:
        size = sum(row["nbytes"] for row in ledger)
        write_json(
            out / "model.safetensors.index.json",
            {"metadata": {"total_size": size}, "weight_map": homes},
        )
    inputs = [{"path": str(path), "weight": weight} for path, weight in adapters.items()]
    plan = {"fingerprint": "f", "base": str(base), "adapters": inputs}
    write_json(out / ".raymeld" / "plan.json", plan)
    return out


def write_ledger(out: Path, rows: list[dict[str, object]]) -> None:
    parquet.write_table(pa.Table.from_pylist(rows), out / ".raymeld" / "ledger.parquet")


def read_rows(out: Path) -> list[dict[str, object]]:
    with open(out / ".raymeld" / "ledger.parquet", "rb") as file:
        return parquet.ParquetFile(file).read().to_pylist()


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content))


def found(out: Path, level: str, **options: object) -> list[tuple[str, str]]:
    """Check and place of each finding."""
    report = verify(out, level, **options)
    assert report.ok == (not report.findings)
    return [(finding.check, finding.where) for finding in report.findings]


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

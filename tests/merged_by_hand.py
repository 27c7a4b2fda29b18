"""Finished merges written by hand, and what ``verify`` finds in them.

Nothing here uses the merge: files, index, plan and ledger are written from their descriptions.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import torch
import xxhash
from oracles import Term
from pyarrow import parquet
from safetensors.torch import load_file

from merge_core.stores.location import locate
from merge_core.verify import FileCheck, Finding, check_file, verify
from merge_core.verify.against_base import Comparison
from merge_core.verify.header import read_header
from merge_core.verify.updates import Delta
from merge_core.verify.weights import BaseTensor

NAMES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.int64: "I64"}
FLOATS = [torch.bfloat16, torch.float16, torch.float32]
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX, LEDGER = "model.safetensors.index.json", ".raymeld/ledger.parquet"
GATE = "model.layers.0.mlp.gate_proj.weight"
Q0, Q1 = (f"model.layers.{n}.self_attn.q_proj.weight" for n in (0, 1))
NORM = "model.layers.0.input_layernorm.weight"
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
        write_json(out / INDEX, {"metadata": {"total_size": size}, "weight_map": homes})
    inputs = [{"path": str(path), "weight": weight} for path, weight in adapters.items()]
    plan = {"fingerprint": "f", "base": str(base), "adapters": inputs}
    write_json(out / ".raymeld" / "plan.json", plan)
    return out


def write_ledger(out: Path, rows: list[dict[str, object]]) -> None:
    parquet.write_table(pa.Table.from_pylist(rows), out / LEDGER)


def read_rows(out: Path) -> list[dict[str, object]]:
    with open(out / LEDGER, "rb") as file:
        return parquet.ParquetFile(file).read().to_pylist()


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content))


def merged_names(adapter: Path) -> dict[str, str]:
    """``merged`` for each tensor that the adapter's keys name."""
    keys = load_file(adapter / "adapter_model.safetensors")
    modules = {key.split(".lora_")[0].removeprefix("base_model.model.") for key in keys}
    return {f"{module}.weight": "merged" for module in modules}


def found(out: Path, level: str, **options: object) -> list[tuple[str, str]]:
    """Check and place of each finding."""
    report = verify(out, level, **options)
    assert report.ok == (not report.findings)
    return [(finding.check, finding.where) for finding in report.findings]


def compare(
    directory: Path, out: torch.Tensor, base: torch.Tensor, terms: Sequence[Term] = ()
) -> list[Finding]:
    """Findings about ``out`` as the sum of ``base`` and the terms (A, B, scale)."""
    files = [directory / name for name in ("out.safetensors", "base.safetensors", "lora")]
    write_weights(files[0], {"w": out})
    # The tensor before it moves the base's data off the page.
    write_weights(files[1], {"pad": torch.zeros(3, dtype=torch.bfloat16), "w": base})
    write_weights(
        files[2],
        {
            f"{n}{name}": t
            for n, term in enumerate(terms)
            for name, t in zip("AB", term, strict=False)
        },
    )
    deltas = tuple(
        Delta(path=locate(files[2]), a=f"{n}A", b=f"{n}B", scale=term[2], transposed=False)
        for n, term in enumerate(terms)
    )
    source = BaseTensor(path=locate(files[1]), entry=read_header(locate(files[1]))[1])
    check = FileCheck(
        file=locate(files[0]),
        level="numeric",
        rows=None,
        comparisons=(Comparison(tensor="w", base=source, updates=deltas),),
    )
    return list(check_file(check).findings)

"""What was done, tensor by tensor: the receipt of a shard and the ledger of a merge.

A worker returns one receipt a shard; the collector keeps each as a small durable file, and folds
them into ``ledger.parquet`` at the commit: one row a tensor. Reports are made from it alone.
"""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorRecord:
    """How one output tensor came about."""

    tensor: str
    action: str
    """What was done to it, see ``TensorTask.action``."""
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    digest: str
    """See ``merge_core.digest``."""
    bytes_read: int
    bytes_written: int
    read_seconds: float
    """Summed over lanes, like the other two; lanes overlap, so the sum may exceed the clock."""
    merge_seconds: float
    write_seconds: float
    base_norm: float | None = None
    """Frobenius norm of the base tensor; this and the next two only where a delta was added."""
    delta_norm: float | None = None
    largest_change: float | None = None
    """Largest absolute element of the delta."""

    @property
    def relative_change(self) -> float | None:
        """Norm of the delta relative to the norm of the base; None where that is no number."""
        if self.delta_norm is None or not self.base_norm:
            return None
        return self.delta_norm / self.base_norm


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """What a worker says about one finished attempt of a shard."""

    fingerprint: str
    """Of the plan that it worked from."""
    shard: int
    attempt: int
    part: str
    """File name of the finished part, unique to this attempt."""
    size: int
    worker: str
    host: str
    device: str
    started: float
    """Seconds since the epoch."""
    seconds: float
    lanes: str
    """What the worker chose, and why."""
    peak_memory: int
    """See ``Peaks``; in bytes, like the next."""
    peak_vram: int | None
    memory_limit: int | None = None
    """What the process held and found free before its first shard; in bytes, like the next. None
    in receipts of versions that did not look."""
    vram_limit: int | None = None
    note: str = ""
    """What a person should know of how the worker went about it; empty: nothing."""
    tensors: tuple[TensorRecord, ...]

    @property
    def about(self) -> dict[str, Any]:
        """All but the tensors."""
        fields = (field.name for field in dataclasses.fields(self))
        return {name: getattr(self, name) for name in fields if name != "tensors"}

    def to_json(self) -> bytes:
        """The receipt as it is kept on disk."""
        return json.dumps(dataclasses.asdict(self), separators=(",", ":")).encode()

    @classmethod
    def from_json(cls, data: bytes) -> Receipt:
        """The receipt that ``to_json`` wrote."""
        fields = json.loads(data)
        rows = fields.pop("tensors")
        tensors = tuple(TensorRecord(**{**row, "shape": tuple(row["shape"])}) for row in rows)
        return cls(**fields, tensors=tensors)


def fold_ledger(
    receipts: Iterable[Receipt], files: Mapping[int, str], about: Mapping[str, Any]
) -> bytes:
    """Fold ``receipts`` into a Parquet file of one row a tensor.

    Args:
        files: name of each shard's file, by shard index.
        about: what holds for the whole merge; kept as JSON in the file's metadata, beside
            ``shards``: of each receipt all but its tensors.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    ordered = sorted(receipts, key=lambda r: r.shard)
    rows = [row for one in ordered for row in rows_of(one, files[one.shard])]
    shards = [{**one.about, "file": files[one.shard]} for one in ordered]
    table = pa.Table.from_pylist(rows, schema=_schema())
    table = table.replace_schema_metadata({"raymeld": json.dumps({**about, "shards": shards})})
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return buffer.getvalue()


def unfold_ledger(data: bytes) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The rows that ``fold_ledger`` wrote, in their order, and what holds for the whole merge.

    Raises:
        ValueError, KeyError: it is no ledger.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pq.read_table(pa.BufferReader(data))
    about = json.loads((table.schema.metadata or {})[b"raymeld"])
    return table.to_pylist(), about


def rows_of(receipt: Receipt, file: str) -> Iterator[dict[str, Any]]:
    """What the ledger says of each tensor of a shard.

    Args:
        file: name of the shard's file.
    """
    return (_row(receipt, file, record) for record in receipt.tensors)


def _row(receipt: Receipt, file: str, record: TensorRecord) -> dict[str, Any]:
    return {
        **dataclasses.asdict(record),
        "relative_change": record.relative_change,
        "file": file,
        "shard": receipt.shard,
        "attempt": receipt.attempt,
        "worker": receipt.worker,
        "host": receipt.host,
        "device": receipt.device,
        "peak_memory": receipt.peak_memory,
        "peak_vram": receipt.peak_vram,
    }


def _schema() -> Any:
    import pyarrow as pa

    text, whole, real = pa.string(), pa.int64(), pa.float64()
    columns = {
        "tensor": text,
        "file": text,
        "action": text,
        "dtype": text,
        "shape": pa.list_(whole),
        "nbytes": whole,
        "digest": text,
        "shard": whole,
        "attempt": whole,
        "worker": text,
        "host": text,
        "device": text,
        "peak_memory": whole,
        "peak_vram": whole,
        "bytes_read": whole,
        "bytes_written": whole,
        "read_seconds": real,
        "merge_seconds": real,
        "write_seconds": real,
        "base_norm": real,
        "delta_norm": real,
        "relative_change": real,
        "largest_change": real,
    }
    return pa.schema(list(columns.items()))

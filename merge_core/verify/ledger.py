"""The ledger of a merge, ``.raymeld/ledger.parquet``: one row a tensor."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from merge_core.stores.location import Location
from merge_core.verify.places import read_bytes
from merge_core.verify.strict_json import MalformedError


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What the merge recorded about one output tensor."""

    tensor: str
    file: str
    action: str
    """copied, converted, replaced or merged."""
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    digest: str
    """32 hex digits, see ``digests``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ledger:
    """All that the merge recorded."""

    rows: dict[str, Row]
    """By tensor."""
    files: dict[str, str]
    """sha256 of each other file that the merge wrote, by name; empty in ledgers without them."""


_COLUMNS = {
    "tensor": str,
    "file": str,
    "action": str,
    "dtype": str,
    "shape": list,
    "nbytes": int,
    "digest": str,
}


def read_ledger(file: Location) -> Ledger:
    """The ledger in ``file``.

    Raises:
        MalformedError: it is no parquet, lacks a column, holds a null or has a tensor twice.
        FileNotFoundError: there is no ledger.
        OSError: it cannot be read.
    """
    import pyarrow as pa  # a quarter of a second, and workers never read the ledger
    from pyarrow import parquet

    data = pa.BufferReader(read_bytes(file))
    try:
        table = parquet.ParquetFile(data).read()
        columns = {name: table.column(name).to_pylist() for name in _COLUMNS}
        about = json.loads((table.schema.metadata or {}).get(b"raymeld", b"{}"))
    except (pa.ArrowException, KeyError, ValueError) as error:
        raise MalformedError(f"it is no ledger ({error})") from error
    rows: dict[str, Row] = {}
    for values in zip(*columns.values(), strict=True):
        row = _row(dict(zip(_COLUMNS, values, strict=True)))
        if row.tensor in rows:
            raise MalformedError(f"tensor {row.tensor!r} has two rows")
        rows[row.tensor] = row
    files = about.get("files", {}) if isinstance(about, dict) else {}
    if not all(isinstance(digest, str) for digest in files.values()):
        raise MalformedError("its list of files holds something else than digests")
    return Ledger(rows=rows, files=files)


def _row(values: dict[str, Any]) -> Row:
    for column, kind in _COLUMNS.items():
        if not isinstance(values[column], kind):
            raise MalformedError(f"column {column} of {values['tensor']!r} is {values[column]!r}")
    return Row(**{**values, "shape": tuple(values["shape"])})

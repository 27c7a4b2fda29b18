"""Recompute the digest of every tensor of a checkpoint, from docs/digest.md alone.

    python examples/recompute_digests.py merged/

Prints ``digest  tensor`` a line, and compares with the ledger if there is one. Needs xxhash, and
pyarrow for the ledger; no raymeld.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import xxhash

CELL = 8 << 20


def digests(file: Path) -> Iterator[tuple[str, str]]:
    with file.open("rb") as data:
        length = int.from_bytes(data.read(8), "little")
        header = json.loads(data.read(length))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            data.seek(8 + length + begin)
            left, cells = end - begin, b""
            while left:
                cell = data.read(min(CELL, left))
                cells += xxhash.xxh3_128_digest(cell)
                left -= len(cell)
            yield name, xxhash.xxh3_128_hexdigest(cells)


def main(directory: Path) -> int:
    found = dict(pair for file in sorted(directory.glob("*.safetensors")) for pair in digests(file))
    for name, digest in sorted(found.items()):
        print(digest, name, sep="  ")
    ledger = directory / ".raymeld" / "ledger.parquet"
    if not ledger.exists():
        return 0
    import pyarrow.parquet as pq

    rows = pq.read_table(ledger, columns=["tensor", "digest"]).to_pylist()
    wrong = [row["tensor"] for row in rows if found.get(row["tensor"]) != row["digest"]]
    print(f"{len(rows)} in the ledger, {len(wrong)} differ", *wrong, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1])))

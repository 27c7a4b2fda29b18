"""The digest of a tensor, recomputed from the file and compared with the ledger.

The tensor's bytes are cut into cells of 8 MiB (the last may be shorter; an empty tensor has none).
Digest = xxh3_128, as 32 hex digits, of the cells' xxh3_128 digests (16 bytes each) in order.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence

import xxhash

from merge_core.verify.header import TensorEntry
from merge_core.verify.ledger import Row
from merge_core.verify.reading import Buffers, Lanes, Source
from merge_core.verify.report import Finding, at

CELL_BYTES = 8 << 20


def cells(entry: TensorEntry) -> list[tuple[int, int]]:
    """Start (in the file) and size of each cell of a tensor, in bytes."""
    return [
        (entry.start + offset, min(CELL_BYTES, entry.nbytes - offset))
        for offset in range(0, entry.nbytes, CELL_BYTES)
    ]


def tensor_digest(cell_digests: Iterable[bytes]) -> str:
    """Digest of a tensor from the digests of its cells, in order."""
    return xxhash.xxh3_128_hexdigest(b"".join(cell_digests))


def check_digests(
    reader: Source, file: str, entries: Sequence[TensorEntry], rows: dict[str, Row], lanes: Lanes
) -> Iterator[Finding]:
    """Read every byte of ``entries`` and yield the tensors whose digest is not their row's.

    Raises:
        OSError: the file cannot be read to its end.
    """

    def cell_digest(cell: tuple[int, int], buffers: Buffers) -> bytes:
        return xxhash.xxh3_128_digest(reader.read(*cell, buffers[0]).data)

    grids = [cells(entry) for entry in entries]
    digests = lanes.map(cell_digest, itertools.chain.from_iterable(grids))
    for entry, grid in zip(entries, grids, strict=True):
        found = tensor_digest(itertools.islice(digests, len(grid)))
        row = rows.get(entry.name)
        if row is not None and row.digest != found:
            what = f"digest {found}, the ledger says {row.digest}"
            yield Finding(check="digest", where=at(file, entry.name), what=what)

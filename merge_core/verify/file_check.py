"""The check of one weight file: the unit that is spread over workers."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from merge_core.errors import AbsentError, InputError, StorageError
from merge_core.stores.location import Location
from merge_core.stores.opening import sent_unread
from merge_core.verify.against_base import Comparison
from merge_core.verify.decomposed import DecomposedTensor
from merge_core.verify.digests import CELL_BYTES, check_digests
from merge_core.verify.experts import slab, slabs
from merge_core.verify.factors import Factors, open_factors, open_source
from merge_core.verify.header import TensorEntry, read_header
from merge_core.verify.ledger import Row
from merge_core.verify.merged import MergedTensor, load_product
from merge_core.verify.reading import Lanes, Source, open_reader
from merge_core.verify.replaced_rows import check_rows
from merge_core.verify.report import Finding, at
from merge_core.verify.sent import check_sent
from merge_core.verify.strict_json import MalformedError
from merge_core.verify.untouched import check_converted, check_copied
from merge_core.verify.updates import Decomposed, Delta, Rows, Shift

NUMERIC_BLOCK_BYTES = 4 << 20
"""Read at a time from output and base each: large enough for the disk, and the float32 and
float64 of a tile beside it keep a lane below 20 MB."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FileCheck:
    """What to check in one weight file; a few kilobytes, picklable."""

    file: Location
    """The weight file; of a path, wherever the check runs must see the same file system."""
    level: str
    """structure, digest or numeric; for load, the part of one file is that of digest."""
    rows: tuple[Row, ...] | None
    """The ledger's rows for this file; None without a ledger."""
    comparisons: tuple[Comparison, ...] = ()
    """What the tensors must be equal to, for numeric."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FileResult:
    """The outcome of one ``FileCheck``."""

    file: Location
    """That of the check."""
    findings: tuple[Finding, ...]
    tensors: int
    """Tensors in the file."""
    bytes_read: int
    """Tensor data compared, in bytes, with the base's for numeric."""
    seconds: float


def check_file(check: FileCheck) -> FileResult:
    """Check one weight file. A file that is broken or vanishes gives findings, never an exception.

    Raises:
        StorageError: the store that keeps it fails, which says nothing of the file.

    Memory: ``reading.LANES`` lanes of up to 20 MB each, and for numeric the factors of one tensor,
    beside the last few that many experts share.
    """
    started = time.perf_counter()
    path = check.file
    findings: list[Finding] = []
    entries: tuple[TensorEntry, ...] = ()
    bytes_read = 0
    try:
        entries = read_header(path)
        rows = {row.tensor: row for row in check.rows or ()}
        if check.rows is not None:
            findings += _compare_rows(path.name, entries, rows)
        sent = sent_unread(path)
        if sent is not None:
            findings += check_sent(path, sent, rows if check.level != "structure" else {})
        elif check.level != "structure":
            findings += _check_digests(path, entries, rows)
        if check.level != "structure":
            bytes_read += sum(entry.nbytes for entry in entries)
        if check.level == "numeric":
            for finding, compared in _check_numeric(path, entries, check.comparisons):
                findings += finding
                bytes_read += compared
    except MalformedError as error:
        findings.append(Finding(check="header", where=path.name, what=str(error)))
    except (OSError, InputError) as error:
        if isinstance(error, StorageError) and not isinstance(error, AbsentError):
            raise
        findings.append(Finding(check="read", where=path.name, what=str(error)))
    return FileResult(
        file=check.file,
        findings=tuple(findings),
        tensors=len(entries),
        bytes_read=bytes_read,
        seconds=time.perf_counter() - started,
    )


def _compare_rows(
    file: str, entries: Sequence[TensorEntry], rows: dict[str, Row]
) -> Iterator[Finding]:
    for entry in entries:
        row = rows.get(entry.name)
        here = f"{entry.dtype} {list(entry.shape)} of {entry.nbytes} bytes"
        if row is None:
            what = f"{here}, but the ledger has no such tensor in this file"
            yield Finding(check="ledger", where=at(file, entry.name), what=what)
        elif (row.dtype, row.shape, row.nbytes) != (entry.dtype, entry.shape, entry.nbytes):
            what = f"{here}, the ledger says {row.dtype} {list(row.shape)} of {row.nbytes} bytes"
            yield Finding(check="ledger", where=at(file, entry.name), what=what)
    for tensor in sorted(rows.keys() - {entry.name for entry in entries}):
        what = "the ledger has it here, the file has not"
        yield Finding(check="ledger", where=at(file, tensor), what=what)


def _check_digests(
    path: Location, entries: Sequence[TensorEntry], rows: dict[str, Row]
) -> list[Finding]:
    with open_reader(path) as reader, Lanes(CELL_BYTES) as lanes:
        return list(check_digests(reader, path.name, entries, rows, lanes))


def _check_numeric(
    path: Location, entries: Sequence[TensorEntry], comparisons: Sequence[Comparison]
) -> Iterator[tuple[list[Finding], int]]:
    """For each comparison its findings, and the bytes that it read."""
    by_name = {entry.name: entry for entry in entries}
    pairs = [(by_name[item.tensor], item) for item in comparisons if item.tensor in by_name]
    adapters = {update.path for item in comparisons for update in item.updates}
    factors = {adapter: open_factors(adapter) for adapter in adapters}
    block = max([NUMERIC_BLOCK_BYTES, *(_widest_row(pair) for pair in pairs)])
    with contextlib.ExitStack() as stack:
        out = stack.enter_context(open_reader(path))
        bases = {_place(item): item.base for _, item in pairs}
        sources: dict[tuple[Location, str], Source] = {
            place: stack.enter_context(open_source(base)) for place, base in bases.items()
        }
        # Last in, first out: no lane may still read when its file is closed.
        lanes = stack.enter_context(Lanes(block))
        for entry, item in pairs:
            base = (sources[_place(item)], item.base.entry)
            found = _compare(path.name, (out, entry), base, item, factors, lanes)
            yield list(found), entry.nbytes + item.base.entry.nbytes


def _place(item: Comparison) -> tuple[Location, str]:
    """Where its base lies; each tensor that is packed, or in a ``.bin``, is a place of its own."""
    path, alone = item.base.path, item.base.packing is not None
    return path, item.base.entry.name if alone or path.name.endswith(".bin") else ""


def _compare(
    file: str,
    out: tuple[Source, TensorEntry],
    base: tuple[Source, TensorEntry],
    item: Comparison,
    factors: Mapping[Location, Factors],
    lanes: Lanes,
) -> Iterator[Finding]:
    """One tensor, by the kinds of its updates."""
    updates = item.updates
    rows = [update for update in updates if isinstance(update, Rows)]
    decomposed = [update for update in updates if isinstance(update, Decomposed)]
    added = [update for update in updates if isinstance(update, Delta | Shift)]
    if rows and len(rows) < len(updates):
        what = "some of its rows are replaced, and others add to the whole of it"
        return iter([Finding(check="adapter", where=at(file, out[1].name), what=what)])
    if rows:
        return check_rows(file, out, base, rows, factors, lanes)
    if decomposed:
        both = [update for update in updates if isinstance(update, Decomposed | Delta)]
        return DecomposedTensor(out, base, both, factors).findings(file, lanes)
    if added and len(out[1].shape) > 2:
        return _compare_slabs(file, out, base, item, factors, lanes)
    if added:
        return MergedTensor(*out, *base, load_product(added, factors)).findings(file, lanes)
    check = check_copied if out[1].dtype == base[1].dtype else check_converted
    return check(file, out, base, lanes, "the adapter's" if item.replaced else "the base's")


def _compare_slabs(
    file: str,
    out: tuple[Source, TensorEntry],
    base: tuple[Source, TensorEntry],
    item: Comparison,
    factors: Mapping[Location, Factors],
    lanes: Lanes,
) -> Iterator[Finding]:
    """A tensor that experts share, a range of rows after the other."""
    deltas = [update for update in item.updates if isinstance(update, Delta)]
    rows = math.prod(out[1].shape[:-1])
    for first, stop, parts in slabs([delta.part for delta in deltas], rows):
        pairs = zip(deltas, parts, strict=True)
        mine = tuple(replace(delta, part=part) for delta, part in pairs if part is not None)
        places = (out[0], slab(out[1], first, stop)), (base[0], slab(base[1], first, stop))
        yield from _compare(file, *places, replace(item, updates=mine), factors, lanes)


def _widest_row(pair: tuple[TensorEntry, Comparison]) -> int:
    """Bytes of the longer row of a merged tensor or its base: a block holds one row at least."""
    entry, item = pair
    rows = math.prod(entry.shape[:-1] or entry.shape)
    return max(entry.nbytes, item.base.entry.nbytes) // rows if item.updates and rows else 0

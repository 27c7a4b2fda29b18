"""The folder as a whole: config, index, which files there are, and the ledger.

What is wrong inside one weight file is ``file_check``'s to say; a file whose header cannot be read
is left out of the comparisons here.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from merge_core.stores.location import Location
from merge_core.verify.header import TensorEntry, read_header
from merge_core.verify.ledger import Ledger, Row, read_ledger
from merge_core.verify.places import exists, names_in, read_bytes
from merge_core.verify.report import Finding, at
from merge_core.verify.strict_json import MalformedError, parse_object
from merge_core.verify.weights import INDEX, SINGLE, WeightIndex, read_index

RECORD = ".raymeld"
LEDGER = f"{RECORD}/ledger.parquet"

Headers = Mapping[str, tuple[TensorEntry, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Structure:
    """A checkpoint, as far as its headers, index and ledger tell."""

    findings: tuple[Finding, ...]
    files: tuple[str, ...]
    """Names of the weight files to check, sorted."""
    headers: Headers
    """File to tensors, of the files whose header can be read."""
    ledger: Ledger | None

    @property
    def rows(self) -> Mapping[str, Row] | None:
        """Tensor to ledger row; None without a ledger."""
        return None if self.ledger is None else self.ledger.rows

    def rows_of(self, file: str) -> tuple[Row, ...] | None:
        """The ledger's rows for one file; None without a ledger."""
        if self.rows is None:
            return None
        return tuple(row for row in self.rows.values() if row.file == file)


def inspect(out: Location, *, committed: bool, needs_ledger: bool) -> Structure:
    """Read everything about ``out`` but tensor data.

    Args:
        out: the checkpoint's folder.
        committed: False before the merge's commit, when config.json is still staged.
        needs_ledger: whether a missing ledger is a finding.
    """
    findings = list(_check_config(out, committed))
    index, expected = _expected_files(out, findings)
    files = _check_files(out, index, expected, findings)
    headers = dict(_readable_headers(out, files))
    findings += _check_duplicates(headers)
    if index is not None:
        findings += _check_index(index, headers)
        if len(headers) == len(files) == len(index.files):
            findings += _check_total_size(index, headers)
    ledger = _ledger(out, needs_ledger, findings)
    homes = Counter(row.file for row in (ledger.rows if ledger else {}).values())
    for file in sorted(homes.keys() - set(files)):
        what = f"the ledger has {homes[file]} tensors in it, the checkpoint has no such file"
        findings.append(Finding(check="ledger", where=file, what=what))
    return Structure(findings=tuple(findings), files=files, headers=headers, ledger=ledger)


def is_unfinished(out: Location) -> bool:
    """Whether a merge was not published: the publishing removes the receipts of its files."""
    if exists(out / "config.json") or not exists(out / f"{RECORD}/plan.json"):
        return False
    return not exists(out / LEDGER) or bool(names_in(out / f"{RECORD}/receipts"))


def config_path(out: Location, *, committed: bool) -> Location:
    """The config that a loader reads, or before the commit the one that it will read."""
    return out / "config.json" if committed else out / f"{RECORD}/config.json"


def _check_config(out: Location, committed: bool) -> Iterator[Finding]:
    path = config_path(out, committed=committed)
    where = "config.json" if committed else f"{RECORD}/config.json"
    try:
        parse_object(read_bytes(path), constants=True)
    except FileNotFoundError:
        what = "it is missing: this is an unfinished merge"
        yield Finding(check="config", where=where, what=what)
    except (OSError, MalformedError) as error:
        yield Finding(check="config", where=where, what=f"it cannot be read ({error})")


def _expected_files(
    out: Location, findings: list[Finding]
) -> tuple[WeightIndex | None, tuple[str, ...] | None]:
    """The index, and the files that must be there; None for a broken index, which cannot say."""
    if not exists(out / INDEX):
        return None, (SINGLE,)
    try:
        index = read_index(out / INDEX)
    except (MalformedError, OSError) as error:
        findings.append(Finding(check="index", where=INDEX, what=str(error)))
        return None, None
    planned = tuple(
        f"model-{n:05d}-of-{len(index.files):05d}.safetensors"
        for n in range(1, len(index.files) + 1)
    )
    if index.files != planned:
        what = f"it names {len(index.files)} files, but not model-00001-of-N to model-N-of-N"
        findings.append(Finding(check="index", where=INDEX, what=what))
    return index, index.files


def _check_files(
    out: Location,
    index: WeightIndex | None,
    expected: tuple[str, ...] | None,
    findings: list[Finding],
) -> tuple[str, ...]:
    """Names of the files to check: those that are expected and there."""
    names = {name for name in names_in(out) if not name.startswith(".")}
    weights = {name for name in names if name.endswith(".safetensors")}
    others = {name for name in names if name.startswith(("pytorch_model", "adapter_"))}
    if expected is None:
        expected = tuple(sorted(weights))
    named_by = "the index names it" if index else "there is no index that names others"
    for name in expected:
        if name not in weights:
            what = f"it is missing, and {named_by}"
            findings.append(Finding(check="files", where=name, what=what))
    for name in sorted(weights.union(others).difference(expected)):
        what = "it is no part of this checkpoint, but a loader could take it for one"
        findings.append(Finding(check="files", where=name, what=what))
    return tuple(name for name in expected if name in weights)


def _readable_headers(
    out: Location, files: tuple[str, ...]
) -> Iterator[tuple[str, tuple[TensorEntry, ...]]]:
    for file in files:
        try:
            yield file, read_header(out / file)
        except (MalformedError, OSError):
            continue  # reported by the check of that file


def _check_duplicates(headers: Headers) -> Iterator[Finding]:
    home: dict[str, str] = {}
    for file, entries in headers.items():
        for entry in entries:
            first = home.setdefault(entry.name, file)
            if first != file:
                what = f"{first} holds a tensor of the same name"
                yield Finding(check="files", where=at(file, entry.name), what=what)


def _check_index(index: WeightIndex, headers: Headers) -> Iterator[Finding]:
    held = {file: {entry.name for entry in entries} for file, entries in headers.items()}
    for tensor, file in index.weight_map.items():
        if file in held and tensor not in held[file]:
            what = "the index has it here, the file has not"
            yield Finding(check="index", where=at(file, tensor), what=what)
    for file, tensors in held.items():
        for tensor in sorted(tensors):
            named = index.weight_map.get(tensor)
            if named != file:
                what = f"the file has it, the index says {named or 'nothing of it'}"
                yield Finding(check="index", where=at(file, tensor), what=what)


def _check_total_size(index: WeightIndex, headers: Headers) -> Iterator[Finding]:
    total = sum(entry.nbytes for entry in itertools.chain.from_iterable(headers.values()))
    if index.total_size != total:
        what = f"total_size is {index.total_size}, the tensors have {total} bytes"
        yield Finding(check="index", where=INDEX, what=what)


def _ledger(out: Location, needs_ledger: bool, findings: list[Finding]) -> Ledger | None:
    try:
        return read_ledger(out / LEDGER)
    except FileNotFoundError:
        if needs_ledger:
            what = "it is missing, so there is nothing to compare the bytes with"
            findings.append(Finding(check="ledger", where=LEDGER, what=what))
    except (MalformedError, OSError) as error:
        findings.append(Finding(check="ledger", where=LEDGER, what=str(error)))
    return None

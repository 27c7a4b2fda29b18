"""``verify``: plan the checks of a finished merge, run them, gather what they find."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain

from merge_core.errors import counted, refuse, some_of
from merge_core.stores.location import Location, Place, locate_out
from merge_core.verify.against_base import Comparison, pair_with_base
from merge_core.verify.file_check import FileCheck, FileResult, check_file
from merge_core.verify.load import check_load
from merge_core.verify.places import names_in
from merge_core.verify.report import LEVELS, Finding, VerifyReport
from merge_core.verify.side_files import check_recorded, compare_with_base
from merge_core.verify.sources import resolve_sources
from merge_core.verify.structure import Structure, config_path, inspect, is_unfinished

Run = Callable[[Callable[[FileCheck], FileResult], Sequence[FileCheck]], Iterable[FileResult]]
"""Like ``map``: applies the function to each check, anywhere; results may come in any order."""

_WORDS = {
    "structure": "config, index, headers, offsets, sizes and the list of files",
    "ledger": "names, dtypes, shapes and sizes against the ledger",
    "digest": "every byte of every file read back and its digest compared with the ledger",
    "numeric": "every value compared with base and adapters in float64 precision",
    "load": "names and shapes against the transformers model class",
}


def verify(
    out: Place,
    level: str = "digest",
    *,
    base: Place | None = None,
    adapters: Sequence[tuple[Place, float]] | None = None,
    committed: bool = True,
    run: Run = map,
) -> VerifyReport:
    """Check a merged checkpoint; a bad one gives findings, not an exception.

    Args:
        out: the checkpoint's folder.
        level: one of ``LEVELS``.
        base: folder of the base, for numeric; default: the plan's.
        adapters: folder and weight of each adapter, for numeric; default: the plan's.
        committed: False inside a merge, while config.json is still staged in ``.raymeld``.
        run: how to run ``check_file`` over the files, such as over a cluster's workers.

    Raises:
        InputError: the question cannot be answered: ``out`` is no directory, the level is
            unknown, base or adapters are not known or cannot be read, or an adapter has a
            feature that this program cannot check (each is named).
    """
    started = time.perf_counter()
    out = locate_out(out)
    if level not in LEVELS:
        raise refuse(f"there is no level {level!r}", "--level", f"Take one of {', '.join(LEVELS)}")
    if not (out.local.is_dir() if out.is_local else names_in(out)):
        raise refuse("it is no directory", str(out), "Name the directory of a merged checkpoint")
    if committed and is_unfinished(out):
        return _unfinished(out, level, started)
    structure = inspect(out, committed=committed, needs_ledger=level != "structure")
    findings = list(structure.findings)
    comparisons: Mapping[str, tuple[Comparison, ...]] = {}
    unchecked: tuple[str, ...] = ()
    recorded = structure.ledger.files if structure.ledger else {}
    if level != "structure":
        findings += check_recorded(out, recorded, committed=committed)
    if level == "numeric":
        sources = resolve_sources(out, base, adapters)
        pairing = pair_with_base(structure, sources)
        comparisons, unchecked = pairing.comparisons, pairing.unchecked
        findings += pairing.findings
        findings += compare_with_base(out, sources, recorded, pairing.config, committed=committed)
    checks = _file_checks(out, level, structure, comparisons)
    results = list(run(check_file, checks))
    findings += chain.from_iterable(result.findings for result in _in_order(checks, results))
    findings += _unchecked(checks, results)
    if level == "load":
        entries = chain.from_iterable(structure.headers.values())
        findings += check_load(config_path(out, committed=committed), entries)
    return VerifyReport(
        out=out,
        level=level,
        findings=tuple(findings),
        files=len(results),
        tensors=sum(result.tensors for result in results),
        bytes_read=sum(result.bytes_read for result in results),
        seconds=time.perf_counter() - started,
        checks=tuple(_words(level, structure, unchecked)),
    )


def _unfinished(out: Location, level: str, started: float) -> VerifyReport:
    """Of a merge whose files are partly there: each of them was checked when it was accepted."""
    what = "this is an unfinished merge: the same merge command again goes on from here"
    return VerifyReport(
        out=out,
        level=level,
        findings=(Finding(check="config", where="config.json", what=what),),
        files=0,
        tensors=0,
        bytes_read=0,
        seconds=time.perf_counter() - started,
        checks=(),
    )


def _file_checks(
    out: Location,
    level: str,
    structure: Structure,
    comparisons: Mapping[str, tuple[Comparison, ...]],
) -> list[FileCheck]:
    return [
        FileCheck(
            file=out / file,
            level="digest" if level == "load" else level,
            rows=structure.rows_of(file),
            comparisons=comparisons.get(file, ()),
        )
        for file in structure.files
    ]


def _in_order(checks: Sequence[FileCheck], results: Sequence[FileResult]) -> list[FileResult]:
    """Results in the order of the files, so that equal checkpoints give equal reports."""
    place = {check.file: n for n, check in enumerate(checks)}
    return sorted(results, key=lambda result: place[result.file])


def _unchecked(checks: Sequence[FileCheck], results: Sequence[FileResult]) -> list[Finding]:
    """A result that got lost on its way must not look like a file without fault."""
    done = {result.file for result in results}
    return [
        Finding(check="files", where=check.file.name, what="its check gave no result")
        for check in checks
        if check.file not in done
    ]


def _words(level: str, structure: Structure, unchecked: Sequence[str]) -> Iterable[str]:
    yield _WORDS["structure"]
    if structure.rows is not None:
        yield _WORDS["ledger"]
        if level != "structure":
            yield _WORDS["digest"]
    if unchecked:
        left = f"{counted(len(unchecked), 'tensor')} of layers that PEFT merged"
        yield f"left to the digest: {left}, {some_of(unchecked)}"
        yield _WORDS[level].replace("every value", "every other value")
    elif level in ("numeric", "load"):
        yield _WORDS[level]

"""The checks of the files may run anywhere and in any order; a lost one is a finding."""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from merged_by_hand import FIRST, SECOND, found

from merge_core.stores.location import locate
from merge_core.verify import FileCheck, FileResult, check_file, verify


def test_checks_and_results_can_travel(finished: Path) -> None:
    """On a cluster they cross processes, and come back in any order."""
    sent: list[int] = []

    def remotely(
        work: Callable[[FileCheck], FileResult], checks: Sequence[FileCheck]
    ) -> Iterable[FileResult]:
        blobs = [pickle.dumps(check) for check in checks]
        sent.extend(map(len, blobs))
        results = [work(pickle.loads(blob)) for blob in blobs]
        return [pickle.loads(pickle.dumps(result)) for result in reversed(results)]

    blob = bytearray((finished / FIRST).read_bytes())
    blob[-1] ^= 1
    (finished / FIRST).write_bytes(blob)
    cut = (finished / SECOND).read_bytes()[:-1]
    (finished / SECOND).write_bytes(cut)

    here, there = (verify(finished, "numeric", run=run) for run in (map, remotely))

    assert here.findings == there.findings
    assert [finding.where.split(":")[0] for finding in here.findings] == [FIRST, FIRST, SECOND]
    assert max(sent) < 20_000


def test_a_check_that_gets_lost_is_a_finding(finished: Path) -> None:
    def lossy(
        work: Callable[[FileCheck], FileResult], checks: Sequence[FileCheck]
    ) -> Iterable[FileResult]:
        return map(work, checks[1:])

    assert found(finished, "digest", run=lossy) == [("files", FIRST)]


def test_a_base_that_vanishes_under_the_check_is_a_finding(finished: Path, base: Path) -> None:
    gone: list[FileCheck] = []
    verify(finished, "numeric", run=lambda work, checks: map(work, gone.extend(checks) or checks))
    comparisons = tuple(
        dataclasses.replace(c, base=dataclasses.replace(c.base, path=locate(base / "gone")))
        for c in gone[0].comparisons
    )

    result = check_file(dataclasses.replace(gone[0], comparisons=comparisons))

    assert [(f.check, f.where) for f in result.findings] == [("read", FIRST)]
    assert f"{base}/gone" in result.findings[0].what

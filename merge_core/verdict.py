"""What follows from a verification: the commit, a failure, or a shard that is merged again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

from merge_core.errors import VerificationError, counted
from merge_core.output import verified_level
from merge_core.stores.location import Location
from merge_core.verify import LEVELS, FileCheck, FileResult, VerifyReport, verify


class Publisher(Protocol):
    """What can make the destination a checkpoint: an ``Assembly``, here or in an actor."""

    def publish(self, verified: Mapping[str, Any]) -> None:
        """See ``Assembly.publish``."""


def conclude(publisher: Publisher, report: VerifyReport) -> None:
    """Publish the result if ``report`` found nothing wrong.

    Raises:
        VerificationError: it did; nothing is published.
    """
    if not report.ok:
        remedy = (
            "Nothing was published. Check disk and memory; the same command again proves what is"
            " there and merges the rest."
        )
        raise _failed(report, remedy)
    publisher.publish(describe_report(report))


def _failed(report: VerifyReport, remedy: str) -> VerificationError:
    found = "; ".join(f"{f.where}: {f.what}" for f in report.findings[:5])
    more = len(report.findings) - 5
    found += f"; and {more} more" * (more > 0)
    what = f"{counted(len(report.findings), 'check')} failed: {found}"
    return VerificationError(what, str(report.out), remedy)


def describe_report(report: VerifyReport) -> dict[str, Any]:
    """The report as JSON holds it."""
    return {
        "level": report.level,
        "ok": report.ok,
        "checks": list(report.checks),
        "findings": [{"check": f.check, "where": f.where, "what": f.what} for f in report.findings],
        "files": report.files,
        "tensors": report.tensors,
        "bytes_read": report.bytes_read,
        "seconds": report.seconds,
    }


def verify_deeper(
    out: Location, level: str, check: Callable[[Location, str], VerifyReport] = verify
) -> VerifyReport | None:
    """Verify a finished merge if it was never verified at ``level``; None if it was.

    Args:
        check: does it, here or on other machines.

    Raises:
        VerificationError: a check failed.
    """
    covering = {"structure": LEVELS, "digest": LEVELS[1:]}.get(level, (level,))
    if verified_level(out) in covering:
        return None
    report = check(out, level)
    if not report.ok:
        raise _failed(report, "It was published before; do not use it.")
    return report


def unproven(checks: Mapping[int, FileCheck], results: Iterable[FileResult]) -> list[int]:
    """The shards whose check found something, or gave no result."""
    good = {result.file for result in results if not result.findings}
    return [index for index, check in checks.items() if check.file not in good]

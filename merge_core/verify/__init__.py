"""Verification of a merged checkpoint: the code behind ``raymeld verify``.

It shares nothing with the merge but the exception classes and the way to a store: its own reading
of headers, ledger and adapters, and its own arithmetic, so that a mistake in the merge cannot hide
behind itself.

    report = verify(Path("OUT"), "numeric")
    if not report.ok:
        print(*report.findings)

Read in this order: ``verification`` (what is checked), ``structure`` and ``file_check`` (the
folder, one file), ``places`` (how they are read), ``digests``, ``sent`` (what goes to the hub),
``side_files``, ``against_base``, ``recipe`` and ``tied`` (what a tensor must be equal to),
``merged`` and ``decomposed`` (the numeric bounds and where they come from), ``replaced_rows``,
``untouched``, ``load``.
"""

from merge_core.verify.against_base import refuse_unchecked
from merge_core.verify.file_check import FileCheck, FileResult, check_file
from merge_core.verify.ledger import Row
from merge_core.verify.report import LEVELS, Finding, VerifyReport
from merge_core.verify.sent import ReadBack, read_back
from merge_core.verify.sources import Sources, parse_weighted
from merge_core.verify.strict_json import MalformedError
from merge_core.verify.verification import verify

__all__ = [
    "LEVELS",
    "FileCheck",
    "FileResult",
    "Finding",
    "MalformedError",
    "ReadBack",
    "Row",
    "Sources",
    "VerifyReport",
    "check_file",
    "parse_weighted",
    "read_back",
    "refuse_unchecked",
    "verify",
]

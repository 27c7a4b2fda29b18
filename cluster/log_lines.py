"""The log as programs want it, one JSON object a line, and back as people want it.

A merge that runs as a Ray Job logs JSON: what collects the logs of a cluster can then find lines by
their fields. Whoever reads such a log through ``raymeld submit`` or ``raymeld jobs logs`` gets the
text that the same merge says in a terminal.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from merge_core.errors import refuse

FORM = "RAYMELD_LOG"
"""The variable that says how to log, wherever: ``json`` or ``text``."""

_FORMS = ("json", "text")

_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Ray sets it for the driver of a job, and for nobody else."""

_LINES = re.compile(r"[^\n]*\n|[^\n]+")
"""Not ``splitlines``, which knows ten ends of a line: a log has one."""


def refuse_unknown_form() -> None:
    """Refuse a value of ``FORM`` that means nothing.

    Raises:
        InputError: it has one.
    """
    chosen = os.environ.get(FORM)
    if chosen and chosen not in _FORMS:
        raise refuse(
            f"{chosen!r} is no form of a log", FORM, "Set it to json or text, or not at all"
        )


def logs_json() -> bool:
    """Whether this process logs JSON: in a Ray Job, unless ``FORM`` says otherwise."""
    chosen = os.environ.get(FORM)
    return chosen == "json" if chosen in _FORMS else _JOB in os.environ


def log(message: str, *, level: str = "info", **fields: Any) -> None:
    """Write a line to stderr, if it can be written to: no merge depends on its log.

    Args:
        level: ``info`` or ``error``.
        fields: what the message says, for programs; left out where None.
    """
    if sys.stderr is None:  # closed by who started us; print would take stdout for it
        return
    record = {
        "time": datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "level": level,
        "message": message,
        "job_id": _job_id(),
        **fields,
    }
    said = {key: value for key, value in record.items() if value is not None}
    with contextlib.suppress(OSError):
        print(json.dumps(said, default=str), file=sys.stderr, flush=True)


def _job_id() -> str | None:
    """The name of the job that this process drives, as ``raymeld jobs list`` shows it."""
    try:
        name = json.loads(os.environ[_JOB])["metadata"]["job_submission_id"]
    except (KeyError, TypeError, ValueError):
        return None
    return str(name)


def plain(log: str) -> str:
    """A log as people read it: of each line that ``log`` wrote its message, all others as is."""
    return "".join(_plain_line(line) for line in _LINES.findall(log))


def _plain_line(line: str) -> str:
    text = line.removesuffix("\n")
    try:
        record = json.loads(text) if text.startswith("{") else None
    except (ValueError, RecursionError):
        return line
    if not isinstance(record, dict):
        return line
    level, message = record.get("level"), record.get("message")
    if "time" not in record or not isinstance(level, str) or not isinstance(message, str):
        return line
    printable = message.encode(errors="replace").decode()  # JSON has halves of characters
    return "error: " * (level == "error") + printable + line[len(text) :]


class LogPrinter:
    """Writes a job's log, which comes in pieces: as people read it, or as it is where this process
    logs JSON itself. Only a line that may yet turn out to be JSON waits for its end.
    """

    def __init__(self, write: Callable[[str], Any]) -> None:
        self._write = write
        self._as_is = logs_json()
        self._held = ""
        self._midline = False
        """Whether the start of the line was written already."""

    def write(self, piece: str) -> None:
        """Take the next piece, of any length."""
        if self._as_is:
            self._write(piece)
            return
        for part in _LINES.findall(piece):
            ends = part.endswith("\n")
            self._held += part
            if self._midline or not self._held.startswith("{"):
                self._release(self._held)
                self._midline = not ends
            elif ends:
                self._release(_plain_line(self._held))

    def close(self) -> None:
        """Write what still waits: nothing comes any more."""
        self._release(_plain_line(self._held))

    def _release(self, text: str) -> None:
        self._held = ""
        self._write(text)

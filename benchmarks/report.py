"""From single runs to tables, as text, Markdown and JSON."""

from __future__ import annotations

import dataclasses
import datetime as dt
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from machine import hardware_name
from measure import Measured

CHECKOUT = Path(__file__).resolve().parent.parent
"""Left out of the commands that are kept: where it lies says nothing to others."""

RESULTS = Path(__file__).resolve().parent / "results"

YARDSTICKS = {"cp": "x cp", "copy-engine": "x copy"}
"""The rows that the others are compared with, round by round: what a user would run, and what this
disk allows."""

HEADINGS = (
    "",
    "median s",
    *YARDSTICKS.values(),
    "min-max s",
    "peak memory, tree",
    "largest process",
    "written",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """Any other measurement: where, by which command, a table, and what to know about it."""

    title: str
    machine: Mapping[str, str]
    table: Sequence[str]
    notes: Sequence[str] = ()
    runs: Mapping[str, Any]
    """Everything that was measured."""

    @property
    def date(self) -> str:
        """Today."""
        return dt.datetime.now(dt.UTC).date().isoformat()

    def markdown(self) -> str:
        """The whole page."""
        facts = {**self.machine, "command": "python " + shlex.join(sys.argv)}
        listed = [f"- {key}: {value}" for key, value in facts.items()]
        notes = [f"- {note}" for note in self.notes]
        blocks = [[f"# {self.title}, {self.date}"], listed, self.table, notes]
        return "\n\n".join("\n".join(block) for block in blocks if block) + "\n"

    def show(self, *, keep_as: str | None) -> None:
        """Print it, and write it to benchmarks/results if it is to be kept under a name."""
        print(self.markdown(), end="")
        if keep_as is not None:
            stem = f"{keep_as}_{hardware_name(dict(self.machine))}_{self.date}"
            document = {"machine": dict(self.machine), "command": sys.argv, "runs": self.runs}
            (RESULTS / f"{stem}.md").write_text(self.markdown())
            (RESULTS / f"{stem}.json").write_text(json.dumps(document, indent=1) + "\n")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What is run, and what came of it."""

    name: str
    title: str
    command: Sequence[str]
    runs: Mapping[int, Measured]
    """By round."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """One benchmark."""

    model: str
    date: str
    command: str
    machine: Mapping[str, str]
    notes: Sequence[str]
    rows: Sequence[Row]

    def ratio(self, row: Row, yardstick: str) -> float | None:
        """The median of each run's seconds over those of the yardstick in the same round."""
        other = next((r.runs for r in self.rows if r.name == yardstick), {})
        ratios = [run.seconds / other[n].seconds for n, run in row.runs.items() if n in other]
        return median(ratios) if ratios else None

    def text(self) -> str:
        """For a terminal."""
        cells = [HEADINGS, *(self._cells(row) for row in self.rows)]
        widths = [max(len(line[n]) for line in cells) for n in range(len(HEADINGS))]
        lines = [
            "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])])
            for line in cells
        ]
        return "\n".join([*self._facts(), "", *lines, "", *self.notes])

    def markdown(self) -> str:
        """For benchmarks/results/."""
        facts = [f"- {fact}" for fact in self._facts()]
        lines = ["| " + " | ".join(self._cells(row)) + " |" for row in self.rows]
        head = ["| " + " | ".join(HEADINGS) + " |", "|---|" + "--:|" * (len(HEADINGS) - 1)]
        title = f"# Qwen1.5-{self.model}, {self.date}"
        notes = [f"- {note}" for note in self.notes]
        return "\n".join([title, "", *facts, "", *head, *lines, "", *notes, ""])

    def document(self) -> dict[str, Any]:
        """For programs: everything that was measured."""
        rows = [
            {
                "name": row.name,
                "title": row.title,
                "command": [word.replace(f"{CHECKOUT}/", "") for word in row.command],
                "median_seconds": median(run.seconds for run in row.runs.values()),
                "ratios": {yardstick: self.ratio(row, yardstick) for yardstick in YARDSTICKS},
                "runs": [{"round": n, **dataclasses.asdict(run)} for n, run in row.runs.items()],
            }
            for row in self.rows
        ]
        facts = {"model": self.model, "date": self.date, "command": self.command}
        return {**facts, "machine": dict(self.machine), "notes": list(self.notes), "rows": rows}

    def write(self, directory: Path, name: str) -> list[Path]:
        """Write both files; those of the same name are replaced."""
        directory.mkdir(parents=True, exist_ok=True)
        markdown, document = directory / f"{name}.md", directory / f"{name}.json"
        markdown.write_text(self.markdown())
        document.write_text(json.dumps(self.document(), indent=1) + "\n")
        return [markdown, document]

    def _facts(self) -> list[str]:
        facts = {**self.machine, "command": self.command}
        return [f"{key}: {value}" for key, value in facts.items()]

    def _cells(self, row: Row) -> tuple[str, ...]:
        runs, ratios = row.runs.values(), [self.ratio(row, y) for y in YARDSTICKS]
        seconds = [run.seconds for run in runs]
        return (
            row.title,
            f"{median(seconds):.2f}",
            *("-" if ratio is None else f"{ratio:.2f}" for ratio in ratios),
            f"{min(seconds):.2f}-{max(seconds):.2f}" if len(seconds) > 1 else "one run",
            f"{max(run.tree_pss for run in runs) / 1e6:,.0f} MB",
            f"{max(run.largest_rss for run in runs) / 1e6:,.0f} MB",
            f"{max(run.output_bytes for run in runs) / 1e9:.3f} GB",
        )

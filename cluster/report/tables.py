"""Tables as the page shows them: it filters, sorts and leafs through them by itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["text", "name", "choice", "number", "real", "percent", "bytes", "seconds"]
"""How values are written, and on which side. ``name``: long, of one word; ``choice``: one of few,
by which the table can be filtered."""


@dataclass(frozen=True, slots=True)
class Column:
    """The head of a column."""

    label: str
    kind: Kind = "text"


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Rows of values, None where one is not known."""

    columns: Sequence[Column]
    rows: Sequence[Sequence[Any]]

    @property
    def document(self) -> dict[str, Any]:
        """As the page wants it."""
        return {
            "columns": [[column.label, column.kind] for column in self.columns],
            "rows": self.rows,
        }


def rounded(value: float) -> float:
    """To five digits, which is more than anybody reads and half the size."""
    return float(f"{value:.5g}")

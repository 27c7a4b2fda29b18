"""Wrong values of a tensor, counted, and the first of them described."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from merge_core.verify.report import Finding, at


@dataclass(frozen=True, slots=True, kw_only=True)
class Wrong:
    """The wrong values of some rows; the fields describe the first of them."""

    count: int
    row: int
    column: int
    value: float
    expected: float
    allowed: float

    def what(self, values: int) -> str:
        """The finding's text; ``values`` is the size of the tensor."""
        return (
            f"{self.count} of {values} values are wrong; the first is {self.value:.9g} in column "
            f"{self.column}, where base and adapters give {self.expected:.9g}, "
            f"give or take {self.allowed:.2g}"
        )


def wrong_values(
    mask: npt.NDArray[np.bool_],
    rows: npt.NDArray[np.int64],
    tile: slice,
    *tables: npt.NDArray[np.float64],
) -> Wrong | None:
    """The masked values; ``tables`` are value, expected and allowed, like ``mask``."""
    places = np.argwhere(mask)
    if not len(places):
        return None
    first = tuple(places[0])
    value, expected, allowed = (float(table[first]) for table in tables)
    return Wrong(
        count=len(places),
        row=int(rows[first[0]]),
        column=tile.start + int(first[1]),
        value=value,
        expected=expected,
        allowed=allowed,
    )


def first_of(found: Sequence[Wrong | None]) -> Wrong | None:
    """The wrong value with the lowest row, then column, with the counts of all."""
    there = [wrong for wrong in found if wrong is not None]
    if not there:
        return None
    first = min(there, key=lambda wrong: (wrong.row, wrong.column))
    return replace(first, count=sum(wrong.count for wrong in there))


def findings_of(
    file: str, tensor: str, values: int, results: Sequence[tuple[Wrong | None, Wrong | None]]
) -> Iterator[Finding]:
    """At most two: values that are not finite, and values that are wrong.

    Args:
        values: size of the tensor.
        results: of each part of it, the ones and the others.
    """
    for check, found in zip(("finite", "merged"), zip(*results, strict=True), strict=False):
        wrong = first_of(found)
        if wrong is not None:
            where = at(file, tensor, wrong.row)
            yield Finding(check=check, where=where, what=wrong.what(values))

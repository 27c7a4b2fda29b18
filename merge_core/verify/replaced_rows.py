"""Embeddings of which some rows were trained: those are the adapters', all others the base's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from merge_core.stores.location import Location
from merge_core.verify.factors import Factors
from merge_core.verify.header import TensorEntry
from merge_core.verify.merged import matrix, read_rows
from merge_core.verify.reading import Buffers, Lanes, Source
from merge_core.verify.report import Finding, at
from merge_core.verify.rounding import from_float32, to_float32
from merge_core.verify.updates import Rows

Place = tuple[Source, TensorEntry]


def check_rows(
    file: str,
    out: Place,
    base: Place,
    updates: Sequence[Rows],
    factors: Mapping[Location, Factors],
    lanes: Lanes,
) -> Iterator[Finding]:
    """Compare every value with the one that it must be, rounded to the output's dtype.

    NaN stays NaN, with any payload; a finite value that becomes infinite is wrong.

    Raises:
        OSError: one of the files cannot be read.
    """
    rows, _ = matrix(out[1])
    trained = {
        token: row
        for update in updates
        for token, row in zip(update.tokens, factors[update.path].read(update.rows), strict=True)
    }
    row_bytes = max(entry.nbytes for _, entry in (out, base)) // max(1, rows)
    step = max(1, lanes.block // max(1, row_bytes))

    def wrong_in(start: int, buffers: Buffers) -> tuple[int, int] | None:
        chunk = (start, min(start + step, rows))
        got = to_float32(read_rows(*out, chunk, buffers[0]), out[1].dtype)
        wanted = to_float32(read_rows(*base, chunk, buffers[1]), base[1].dtype).copy()
        for token in range(*chunk):
            if token in trained:
                wanted[token - start] = trained[token]
        with np.errstate(all="ignore"):  # an overflow is a finding, not a warning
            rounded = to_float32(from_float32(wanted, out[1].dtype), out[1].dtype)
        same = got.view(np.uint32) == rounded.view(np.uint32)  # as bits, because -0.0 == 0.0
        same |= np.isnan(got) & np.isnan(rounded)
        places = np.argwhere(~same | (np.isinf(got) & np.isfinite(wanted)))
        return (start + int(places[0][0]), int(places[0][1])) if len(places) else None

    found = [place for place in lanes.map(wrong_in, range(0, rows, step)) if place is not None]
    if found:
        row, column = found[0]
        whose = "an adapter's" if row in trained else "the base's"
        what = f"column {column} is not {whose} value rounded to {out[1].dtype}"
        yield Finding(check="merged", where=at(file, out[1].name, row), what=what)

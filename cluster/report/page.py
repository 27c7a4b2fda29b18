"""The page: one HTML file that needs nothing else, and asks nobody for anything.

The library of the charts (Apache ECharts) and the data are in it, compressed; the page's own policy
forbids every request, and every script that is not one of these two.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
from importlib import resources
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from cluster.console import gb
from cluster.report import accounting, facts, timeline
from cluster.report.changes import changed, heat_map, tensor_table
from cluster.report.evidence import Evidence
from cluster.report.spectrum import Spectrum
from cluster.report.tables import Column, Table, rounded

SCRIPTS = ("tables.js", "charts.js")
"""One script of the page, in this order."""

LIBRARY = "echarts.min.js.gz"
"""``dist/echarts.min.js`` of the npm package echarts 6.1.0, as it is, through ``gzip -9n``."""

MOST_CHANGED = 20
"""Tensors in the list of those that changed most; the table behind it has all of them."""


def page(evidence: Evidence, spectra: list[Spectrum]) -> str:
    """The whole report.

    Args:
        spectra: singular values, as far as they were asked for.
    """
    script = "".join(_file(name).decode() for name in SCRIPTS)
    library = _file(LIBRARY)
    environment = Environment(
        loader=PackageLoader("cluster.report", "page"),
        autoescape=select_autoescape(default=True),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"clock": facts.clock, "gb": gb}
    found = accounting.uses(evidence)
    lines = timeline.timelines(evidence)
    return environment.get_template("page.html").render(
        title=facts.title(evidence),
        outcome=facts.outcome(evidence),
        figures=list(facts.figures(evidence)),
        gaps=list(facts.gaps(evidence)),
        inputs=list(facts.inputs(evidence)),
        verified=evidence.verified,
        most_changed=changed(evidence.tensors)[:MOST_CHANGED],
        spectra=spectra,
        adapters=evidence.plan["adapters"],
        accounts=accounting.summary(found),
        runs=evidence.runs,
        troubles=[one for one in evidence.attempts if one["outcome"] in ("failed", "lost")],
        timelines=lines,
        plan=evidence.plan,
        style=_file("page.css").decode(),
        script=script,
        hashes=[_hash(script.encode()), _hash(gzip.decompress(library))],
        library=_letters(library),
        data=_letters(_packed(_data(evidence, lines, found, spectra))),
    )


def _data(
    evidence: Evidence,
    lines: list[timeline.RunTimeline],
    found: list[accounting.Use],
    spectra: list[Spectrum],
) -> dict[str, Any]:
    """What charts and tables are made of."""
    heat = heat_map(evidence.tensors)
    memory = timeline.memory_table(evidence.shards)
    return {
        "runs": [
            {
                "title": line.title,
                "began": line.began,
                "seconds": rounded(line.seconds),
                "phases": line.phases,
                "workers": line.workers,
                "bars": [
                    [b.worker, b.what, b.outcome, round(b.began, 3), round(b.ended, 3), b.why]
                    for b in line.bars
                ],
                "rates": line.rates,
            }
            for line in lines
        ],
        "heat": {"layers": heat.layers, "modules": heat.modules, "cells": heat.cells},
        "spectra": [[one.tensor, [rounded(v) for v in one.values]] for one in spectra],
        "tables": {
            "bars": timeline.bar_table(lines).document,
            "rates": _rate_table(lines).document,
            "memory": memory.document,
            "heat": heat.table.document,
            "tensors": tensor_table(evidence.tensors).document,
            "keys": accounting.key_table(found, evidence).document,
        },
    }


def _rate_table(lines: list[timeline.RunTimeline]) -> Table:
    columns = [
        Column("Run", "number"),
        Column("Phase", "choice"),
        Column("After", "seconds"),
        Column("Bytes a second", "bytes"),
    ]
    rows = [
        [number, phase, after, rate]
        for number, line in enumerate(lines, 1)
        for phase, points in line.rates
        for after, rate in points
    ]
    return Table(columns=columns, rows=rows)


def _file(name: str) -> bytes:
    return resources.files("cluster.report").joinpath("page", name).read_bytes()


def _packed(data: dict[str, Any]) -> bytes:
    """As JSON, compressed; the same for the same data."""
    return gzip.compress(json.dumps(data, separators=(",", ":")).encode(), mtime=0)


def _letters(content: bytes) -> str:
    """In letters that mean nothing in HTML."""
    return base64.b64encode(content).decode()


def _hash(script: bytes) -> str:
    """As a content security policy names a script that may run."""
    return _letters(hashlib.sha256(script).digest())

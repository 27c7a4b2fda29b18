"""``raymeld report``: one page about a merge."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cluster.answering import answering
from cluster.help_screen import ONE_MERGE, App
from cluster.options import Anonymous, Debug, EndpointUrl, Json, Region


def register(app: App) -> None:
    """Add the command to the command line."""
    app.add(report, rich_help_panel=ONE_MERGE)


def report(
    out: Annotated[
        str, typer.Argument(metavar="OUT", help="The --out of a merge, or its --state.")
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="FILE", help="The page; OUT-report.html here, unless given."
        ),
    ] = None,
    spectrum: Annotated[
        int,
        typer.Option(min=0, metavar="N", help="Singular values of so many of the largest deltas."),
    ] = 0,
    endpoint_url: EndpointUrl = None,
    region: Region = None,
    anonymous: Anonymous = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write one HTML page about a merge, finished or not.

    raymeld report merged --spectrum 10
    """
    with answering(as_json=as_json, debug=debug, out=out):
        from cluster import console
        from cluster.report.evidence import read_evidence
        from cluster.report.facts import outcome
        from cluster.report.page import page
        from cluster.report.spectrum import spectra
        from merge_core.storage import reported
        from merge_core.stores.location import Access, locate_out

        access = Access(endpoint_url=endpoint_url, region=region, anonymous=anonymous)
        place = locate_out(out, access)
        evidence = read_evidence(place)
        found = spectra(evidence, spectrum) if spectrum else []
        shown = page(evidence, found)
        text = shown.encode(errors="replace")  # paths may hold bytes that are no UTF-8, as of GBK
        target = output or Path(f"{place.name}-report.html")
        with reported(target):
            target.write_bytes(text)
        result = outcome(evidence)
        document = {
            "ok": True,
            "out": str(out),
            "report": str(target.absolute()),
            "bytes": len(text),
            "outcome": result.title,
        }
        lines = [f"{result.title}: {result.text}", f"report   {target}, {console.gb(len(text))}"]
        missed = dict.fromkeys(one.why for one in found if one.why)
        lines += [f"note     no singular values: {why}" for why in missed]
        console.answer(lines, document, as_json=as_json)

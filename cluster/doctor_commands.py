"""``raymeld doctor``: whether a merge would work, before it is tried."""

from __future__ import annotations

from typing import Annotated

import typer

from cluster.answering import answering, end
from cluster.options import Anonymous, Debug, EndpointUrl, Json, Quiet, Region
from merge_core.stores.location import Access, locate, locate_out


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command()(doctor)


def doctor(  # noqa: PLR0913, PLR0917 - one parameter an option
    base: Annotated[
        str | None, typer.Argument(metavar="BASE", help="Base checkpoint, as merge takes it.")
    ] = None,
    adapters: Annotated[
        list[str] | None,
        typer.Argument(metavar="ADAPTER[@WEIGHT]", help="PEFT adapters, likewise."),
    ] = None,
    out: Annotated[str | None, typer.Option("--out", "-o", help="Where to merge to.")] = None,
    address: Annotated[
        str,
        typer.Option(
            envvar="RAY_ADDRESS",
            help="A Ray cluster; 'local': a Ray of its own; 'inline': this process, no Ray.",
        ),
    ] = "inline",
    endpoint_url: EndpointUrl = None,
    region: Region = None,
    anonymous: Anonymous = False,
    timeout: Annotated[
        float, typer.Option(min=0, help="Seconds that a node may take for an answer.")
    ] = 60.0,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Examine this machine, or every node of a cluster, for a merge: software, memory, GPUs, paths.

    Writes a small file beside OUT on every node and removes it. Exit code: 0 fit, 1 problems.

    Example: raymeld doctor /models/base /models/lora --out /models/merged --address head:6379
    """
    with answering(as_json=as_json, debug=debug):
        from cluster import console
        from cluster.diagnosis import diagnose
        from cluster.doctor import Intent, examine
        from cluster.doctor_report import report_document, report_lines
        from cluster.talk import Talk

        access = Access(endpoint_url=endpoint_url, region=region, anonymous=anonymous)
        intent = Intent(
            base=locate(base, access) if base is not None else None,
            adapters=adapters or [],
            out=locate_out(out, access) if out is not None else None,
            access=access,
        )
        checkup = examine(address, intent, seconds=timeout, say=Talk(quiet=quiet).say)
        diagnosis = diagnose(checkup)
        console.answer(
            report_lines(checkup, diagnosis),
            report_document(checkup, diagnosis),
            as_json=as_json,
        )
        if diagnosis.problems:
            end(1, "; ".join(map(str, diagnosis.problems)), out=intent.out)

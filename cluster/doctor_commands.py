"""``raymeld doctor``: whether a merge would work, before it is tried."""

from __future__ import annotations

from typing import Annotated

import typer

from cluster.answering import answering, end
from cluster.help_screen import CLUSTERS, WHERE, App
from cluster.hub_options import HubOptions
from cluster.option_groups import with_options
from cluster.options import Anonymous, Debug, EndpointUrl, Json, Quiet, RayAddress, Region
from merge_core.stores.location import Access, locate


def register(app: App) -> None:
    """Add the command to the command line."""
    app.add(doctor, rich_help_panel=CLUSTERS)


@with_options(hub=HubOptions)
def doctor(  # noqa: PLR0913 - one parameter an option
    *,
    base: Annotated[
        str | None, typer.Argument(metavar="BASE", help="Base checkpoint, as merge takes it.")
    ] = None,
    adapters: Annotated[
        list[str] | None,
        typer.Argument(metavar="ADAPTER[@WEIGHT]...", help="PEFT adapters, likewise."),
    ] = None,
    out: Annotated[
        str | None, typer.Option("--out", "-o", metavar="OUT", help="Where to merge to.")
    ] = None,
    address: RayAddress = "inline",
    endpoint_url: EndpointUrl = None,
    region: Region = None,
    anonymous: Anonymous = False,
    hub: HubOptions,
    timeout: Annotated[
        float,
        typer.Option(
            min=0, metavar="SECONDS", rich_help_panel=WHERE, help="Wait so long for a node."
        ),
    ] = 60.0,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Examine this machine, or each node of a cluster.

    Software, memory, GPUs, and whether BASE, ADAPTER and OUT are the same everywhere. Writes a
    small file beside OUT, or its state, on every node and removes it. Exit code: 0 fit, 1 problems.

    raymeld doctor Qwen1.5-7B my-lora --out merged
    raymeld doctor /mnt/base /mnt/lora --out /mnt/merged --address head:6379
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
            out=hub.locate_any(out, access),
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

"""``raymeld verify`` and ``status``: what became of a merge."""

from __future__ import annotations

from typing import Annotated

import typer

from cluster.answering import answering, end
from cluster.options import (
    Anonymous,
    Debug,
    EndpointUrl,
    Json,
    Level,
    Quiet,
    Region,
    StartTimeout,
    Workers,
    refuse_workers,
)
from merge_core.errors import VerificationError, counted
from merge_core.stores.location import Access, locate


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.command()(verify)
    app.command()(status)


def verify(  # noqa: PLR0913, PLR0917 - one parameter an option
    out: Annotated[str, typer.Argument(metavar="OUT", help="A merged checkpoint.")],
    level: Annotated[Level, typer.Option(help="How deep to look.")] = Level.DIGEST,
    base: Annotated[str | None, typer.Option(help="The base, for numeric.")] = None,
    adapter: Annotated[
        list[str] | None, typer.Option(metavar="ADAPTER[@WEIGHT]", help="An adapter, for numeric.")
    ] = None,
    address: Annotated[
        str,
        typer.Option(
            help="A Ray cluster to read with; 'inline' (whatever RAY_ADDRESS is): no Ray."
        ),
    ] = "inline",
    workers: Workers = None,
    start_timeout: StartTimeout = 1800.0,
    endpoint_url: EndpointUrl = None,
    region: Region = None,
    anonymous: Anonymous = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Check a merged checkpoint against its ledger, its inputs, or the model class.

    Base and adapters are those that the merge recorded, unless given.
    """
    with answering(as_json=as_json, debug=debug, out=out):
        from cluster import console
        from merge_core.verify import parse_weighted
        from merge_core.verify import verify as verify_checkpoint

        access = Access(endpoint_url=endpoint_url, region=region, anonymous=anonymous)
        target, source = locate(out, access), locate(base, access) if base else None
        given = [parse_weighted(text, access) for text in adapter] if adapter else None
        if address == "inline":
            refuse_workers(workers, 0)
            report = verify_checkpoint(target, level, base=source, adapters=given)
        else:
            from cluster.checking import verify_on_ray
            from cluster.talk import Talk
            from cluster.workers import ClusterOptions

            options = ClusterOptions(
                address=address, device="cpu", workers=workers, start_timeout=start_timeout
            )
            talk = Talk(quiet=quiet, out=out)
            with talk.progress():
                report = verify_on_ray(
                    target,
                    level,
                    options,
                    base=source,
                    adapters=given,
                    watch=talk.watch,
                    say=talk.say,
                )
        document = {"ok": report.ok, **console.report_document(report)}
        console.answer(console.report_lines(report), document, as_json=as_json)
        if not report.ok:
            failed = counted(len(report.findings), "check")
            end(
                VerificationError.exit_code,
                f"{failed} failed, the first: {report.findings[0]}",
                out=out,
            )


def status(
    out: Annotated[str, typer.Argument(metavar="OUT", help="The --out of a merge.")],
    endpoint_url: EndpointUrl = None,
    region: Region = None,
    anonymous: Anonymous = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Say what a running or stopped merge has done; reads OUT alone."""
    with answering(as_json=as_json, debug=debug):
        from cluster import console
        from cluster.status import read_status, status_document, status_lines

        access = Access(endpoint_url=endpoint_url, region=region, anonymous=anonymous)
        found = read_status(locate(out, access))
        console.answer(status_lines(found), status_document(found), as_json=as_json)

"""``raymeld verify`` and ``status``: what became of a merge."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

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
from merge_core.errors import InterruptedMergeError, VerificationError, counted, refuse
from merge_core.stores.location import Access, Location, locate, locate_out

if TYPE_CHECKING:
    from cluster.status import Status


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
        target, source = locate_out(out, access), locate(base, access) if base else None
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
    watch: Annotated[
        bool, typer.Option("--watch", "-w", help="Show it as it happens, until it ends.")
    ] = False,
    endpoint_url: EndpointUrl = None,
    region: Region = None,
    anonymous: Anonymous = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Say what a running or stopped merge has done; reads OUT alone.

    With --watch: exit code 0 when the merge has ended, however it did; Ctrl-C leaves it alone.
    """
    with answering(as_json=as_json, debug=debug):
        from cluster import console
        from cluster.status import read_status, status_document, status_lines

        if watch and as_json:
            remedy = "Ask for one of them"
            raise refuse("an answer in JSON is given once", "--json with --watch", remedy)
        access = Access(endpoint_url=endpoint_url, region=region, anonymous=anonymous)
        target = locate_out(out, access)
        found = _watched(target) if watch else read_status(target)
        console.answer(status_lines(found), status_document(found), as_json=as_json)


def _watched(out: Location) -> Status:
    from rich.console import Console

    from cluster.status_watch import watch_status
    from cluster.stderr import Stderr

    try:
        return watch_status(out, Console(highlight=False))
    except KeyboardInterrupt:
        Stderr().print("left; the merge goes on")
        raise typer.Exit(InterruptedMergeError.exit_code) from None

"""``raymeld verify`` and ``status``: what became of a merge."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from cluster.answering import answering, end
from cluster.help_screen import ONE_MERGE, WHERE, App
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
from merge_core.stores.location import Access, Location, Place, locate, locate_out

if TYPE_CHECKING:
    from cluster.status import Status
    from cluster.talk import Talk
    from merge_core.verify import VerifyReport


def register(app: App) -> None:
    """Add the commands to the command line."""
    app.add(verify, rich_help_panel=ONE_MERGE)
    app.add(status, rich_help_panel=ONE_MERGE)


def verify(  # noqa: PLR0913, PLR0917 - one parameter an option
    out: Annotated[str, typer.Argument(metavar="OUT", help="A merged checkpoint, or a --state.")],
    level: Annotated[
        Level, typer.Option(metavar="LEVEL", help="structure, digest, numeric or load.")
    ] = Level.DIGEST,
    base: Annotated[
        str | None, typer.Option(metavar="BASE", help="For numeric, if it has moved.")
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(metavar="ADAPTER[@WEIGHT]", help="For numeric, if it has moved."),
    ] = None,
    address: Annotated[
        str,
        typer.Option(
            metavar="ADDRESS",
            rich_help_panel=WHERE,
            help="A Ray cluster to read with; inline, whatever RAY_ADDRESS is: no Ray.",
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
    """Check a result against its ledger, inputs, or model class.

    Base and adapters are those that the merge recorded, unless given.

    raymeld verify merged --level numeric
    """
    with answering(as_json=as_json, debug=debug, out=out):
        from cluster import console
        from cluster.talk import Talk
        from merge_core.hub_model import refuse_recordless
        from merge_core.upload import destination_of
        from merge_core.verify import parse_weighted

        access = Access(endpoint_url=endpoint_url, region=region, anonymous=anonymous)
        place, source = locate_out(out, access), locate(base, access) if base else None
        refuse_recordless(place)
        target = destination_of(place) or place
        given = [parse_weighted(text, access) for text in adapter] if adapter else None
        talk = Talk(quiet=quiet, out=out)
        if address == "inline":
            refuse_workers(workers, 0)
            with talk.progress():
                report = _verified_here(target, level, source, given, talk)
        else:
            from cluster.checking import verify_on_ray
            from cluster.workers import ClusterOptions

            options = ClusterOptions(
                address=address, device="cpu", workers=workers, start_timeout=start_timeout
            )
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


def _verified_here(
    out: Location,
    level: str,
    base: Place | None,
    adapters: Sequence[tuple[Place, float]] | None,
    talk: Talk,
) -> VerifyReport:
    """In this process, which takes as long as reading all of it: bars and lines tell how far."""
    from cluster.tasks import PHASES, VERIFYING, size_of
    from merge_core.progress import in_turn
    from merge_core.verify import verify as verify_checkpoint

    run = in_turn(PHASES[VERIFYING], talk.watch, size_of)
    return verify_checkpoint(out, level, base=base, adapters=adapters, run=run)


def status(
    out: Annotated[
        str, typer.Argument(metavar="OUT", help="The --out of a merge, or its --state.")
    ],
    watch: Annotated[
        bool, typer.Option("--watch", "-w", help="Show it as it happens, until it ends.")
    ] = False,
    endpoint_url: EndpointUrl = None,
    region: Region = None,
    anonymous: Anonymous = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Say what a running or stopped merge has done.

    Reads OUT alone. With --watch: exit code 0 when the merge has ended, however it did; Ctrl-C
    leaves it alone.

    raymeld status merged --watch
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

"""The plan command: what a merge would do, need and take."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Annotated

import typer

from cluster.answering import answering
from cluster.help_screen import ONE_MERGE, TIME, WHAT, App
from cluster.hub_options import HubOptions
from cluster.option_groups import with_options
from cluster.options import Debug, Device, Json, Level, bytes_a_second, node_counts
from cluster.plan_options import PlanOptions
from cluster.words import Words, named_by


def register(app: App) -> None:
    """Add the command to ``app``."""
    app.add(plan, rich_help_panel=ONE_MERGE)


@with_options(asked=PlanOptions, hub=HubOptions)
def plan(  # noqa: PLR0913 - one parameter an option
    *,
    words: Words,
    out: Annotated[
        str | None,
        typer.Option(
            "--out", "-o", metavar="OUT", rich_help_panel=WHAT, help="Check this place as well."
        ),
    ] = None,
    asked: PlanOptions,
    hub: HubOptions,
    nodes: Annotated[
        str,
        typer.Option(
            metavar="LIST", rich_help_panel=TIME, help="On so many equal nodes, as 1,8,64."
        ),
    ] = "1",
    workers_per_node: Annotated[
        int, typer.Option(min=1, metavar="N", rich_help_panel=TIME, help="Workers of such a node.")
    ] = 1,
    device: Annotated[
        Device,
        typer.Option(metavar="DEVICE", rich_help_panel=TIME, help="cuda or cpu; auto: cpu."),
    ] = Device.AUTO,
    node_bandwidth: Annotated[
        str,
        typer.Option(
            metavar="RATE", rich_help_panel=TIME, help="Node to storage, each way, as 10Gbit/s."
        ),
    ] = "1.25GB/s",
    storage_bandwidth: Annotated[
        str | None,
        typer.Option(
            metavar="RATE", rich_help_panel=TIME, help="The storage's, for all, both ways together."
        ),
    ] = None,
    verify: Annotated[
        Level,
        typer.Option(
            metavar="LEVEL", rich_help_panel=TIME, help="structure, digest, numeric or load."
        ),
    ] = Level.DIGEST,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Say what a merge would do, need and take; reads headers.

    raymeld plan Qwen1.5-72B my-lora --nodes 1,8,64 --node-bandwidth 25Gbit/s
    """
    with answering(as_json=as_json, debug=debug):
        from cluster import console
        from cluster.estimate import Machines, estimate
        from cluster.estimate_report import estimate_documents, estimate_lines
        from cluster.pools import find_pools
        from merge_core.destination import check_destination, notes_on, shards_there
        from merge_core.server_copy import copy_notes
        from merge_core.upload import notes_on_scratch

        counts = node_counts(nodes)
        machines = Machines(
            nodes=counts[0],
            workers=workers_per_node,
            device="cuda" if device == Device.CUDA else "cpu",
            network=bytes_a_second(node_bandwidth, "--node-bandwidth"),
            storage=bytes_a_second(storage_bandwidth, "--storage-bandwidth")
            if storage_bandwidth
            else math.inf,
        )
        target = hub.locate_any(out, asked.access)
        planned = asked.plan(*named_by(words, asked.access))
        there: frozenset[int] = frozenset()
        if target is not None:
            check_destination(target, planned)
            there = shards_there(target, planned)
            notes = [
                *map(str, (*notes_on(target), *notes_on_scratch(target, planned))),
                *copy_notes(planned, target),
            ]
            planned = replace(planned, notes=(*planned.notes, *notes))
        pools = find_pools(planned)
        estimates = {n: estimate(planned, replace(machines, nodes=n), verify) for n in counts}
        console.answer(
            [
                *console.plan_lines(planned, pools, there),
                *estimate_lines(estimates, machines, verify),
            ],
            console.plan_document(planned, pools, there)
            | {"estimates": estimate_documents(estimates, machines, verify)},
            as_json=as_json,
        )

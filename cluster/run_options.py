"""The options of a merge that change no byte of its result: where, by whom, how well verified."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer

from cluster.help_screen import WHAT, WHERE
from cluster.options import Device, Level, RayAddress, StartTimeout, Workers


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """Where a merge goes, and who does it."""

    out: Annotated[
        str,
        typer.Option(
            "--out",
            "-o",
            metavar="OUT",
            rich_help_panel=WHAT,
            help="Where to: path, s3://, gs:// or hf://.",
        ),
    ]
    verify: Annotated[
        Level,
        typer.Option(
            metavar="LEVEL",
            rich_help_panel=WHAT,
            help="structure, digest, numeric or load.",
        ),
    ] = Level.DIGEST
    address: RayAddress = "local"
    device: Annotated[
        Device,
        typer.Option(metavar="DEVICE", rich_help_panel=WHERE, help="auto, cuda or cpu."),
    ] = Device.AUTO
    workers: Workers = None
    cpu_workers: Annotated[
        int,
        typer.Option(
            min=0, metavar="N", rich_help_panel=WHERE, help="CPU workers beside the GPU workers."
        ),
    ] = 0
    gpus_per_worker: Annotated[
        float, typer.Option(min=0.01, metavar="N", rich_help_panel=WHERE, help="GPUs a worker.")
    ] = 1.0
    start_timeout: StartTimeout = 1800.0

"""The options of a merge that change no byte of its result: where, by whom, how well verified."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer

from cluster.options import Device, Level, StartTimeout, Workers


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """Where a merge goes, and who does it."""

    out: Annotated[str, typer.Option("--out", "-o", help="Where to: path, s3:// or gs://.")]
    address: Annotated[
        str,
        typer.Option(
            envvar="RAY_ADDRESS",
            help="A Ray cluster; 'local': a Ray of its own; 'inline': this process, no Ray.",
        ),
    ] = "local"
    workers: Workers = None
    cpu_workers: Annotated[int, typer.Option(min=0, help="CPU workers beside the GPU workers.")] = 0
    gpus_per_worker: Annotated[float, typer.Option(min=0.01, help="GPUs a worker.")] = 1.0
    start_timeout: StartTimeout = 1800.0
    device: Annotated[Device, typer.Option(help="Where to compute.")] = Device.AUTO
    verify: Annotated[
        Level, typer.Option(help="What to verify before the result is published.")
    ] = Level.DIGEST

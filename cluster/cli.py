"""The command line."""

from __future__ import annotations

import gc
import signal
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from cluster import (
    doctor_commands,
    jobs_commands,
    plan_commands,
    push_commands,
    report_commands,
    result_commands,
)
from cluster.answering import answering
from cluster.help_screen import CLUSTERS, ONE_MERGE, WHAT, WHERE, App
from cluster.options import (
    Debug,
    Device,
    Json,
    Level,
    Quiet,
    RayAddress,
    StartTimeout,
    Workers,
    refuse_workers,
)
from cluster.plan_options import PlanOptions, with_plan_options

app = App(
    help="""Fold PEFT LoRA adapters into Qwen1.5 checkpoints, on a Ray cluster or on this machine.

    raymeld plan Qwen1.5-7B my-lora                  # what would happen
    raymeld merge Qwen1.5-7B my-lora --out merged    # merge, verify, publish
    raymeld merge --help                             # each command has a screen
    """,
)


@with_plan_options
def merge(  # noqa: PLR0913 - one parameter an option
    *,
    out: Annotated[
        str,
        typer.Option(
            "--out",
            "-o",
            metavar="OUT",
            rich_help_panel=WHAT,
            help="Where to: path, s3:// or gs://.",
        ),
    ],
    asked: PlanOptions,
    verify: Annotated[
        Level,
        typer.Option(
            metavar="LEVEL",
            rich_help_panel=WHAT,
            help="structure, digest, numeric or load.",
        ),
    ] = Level.DIGEST,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", rich_help_panel=WHAT, help="Replace an earlier merge in OUT."),
    ] = False,
    address: RayAddress = "local",
    device: Annotated[
        Device,
        typer.Option(metavar="DEVICE", rich_help_panel=WHERE, help="auto, cuda or cpu."),
    ] = Device.AUTO,
    workers: Workers = None,
    cpu_workers: Annotated[
        int,
        typer.Option(
            min=0, metavar="N", rich_help_panel=WHERE, help="CPU workers beside the GPU workers."
        ),
    ] = 0,
    gpus_per_worker: Annotated[
        float, typer.Option(min=0.01, metavar="N", rich_help_panel=WHERE, help="GPUs a worker.")
    ] = 1.0,
    start_timeout: StartTimeout = 1800.0,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Merge adapters into a base checkpoint, verify, publish.

    raymeld merge Qwen1.5-7B my-lora other-lora@0.5 --out merged
    raymeld merge Qwen1.5-7B my-lora --out merged --verify numeric
    """
    with answering(as_json=as_json, debug=debug, out=out, resumes=True):
        from cluster import console
        from cluster.pools import find_pools
        from cluster.talk import Talk

        talk = Talk(quiet=quiet, out=out)
        target, plan = asked.locate_out(out), asked.plan()
        for line in console.plan_lines(plan, find_pools(plan)):
            talk.say(line)
        with talk.progress():
            if address == "inline":
                refuse_workers(workers, cpu_workers)
                from merge_core.merge import merge as merge_inline

                result = merge_inline(
                    plan,
                    target,
                    level=verify,
                    device=device,
                    overwrite=overwrite,
                    watch=talk.watch,
                    say=talk.say,
                )
            else:
                from cluster.driver import merge_on_ray
                from cluster.workers import ClusterOptions

                options = ClusterOptions(
                    address=address,
                    device=device,
                    workers=workers,
                    cpu_workers=cpu_workers,
                    gpus_per_worker=gpus_per_worker,
                    start_timeout=start_timeout,
                )
                result = merge_on_ray(
                    plan,
                    target,
                    options,
                    level=verify,
                    overwrite=overwrite,
                    watch=talk.watch,
                    say=talk.say,
                )
        console.answer(
            console.result_lines(result, plan),
            console.result_document(result, plan),
            as_json=as_json,
        )


def demo(
    directory: Annotated[
        Path, typer.Argument(metavar="DIRECTORY", help="Where to work; must not exist.")
    ] = Path("demo-merge"),
    debug: Debug = False,
) -> None:
    """Make a small checkpoint and a LoRA, merge, compare answers.

    raymeld demo my-demo
    """
    with answering(as_json=False, debug=debug):
        from cluster.demo import run_demo

        run_demo(directory)


def spot_notice(
    address: Annotated[
        str,
        typer.Option(
            envvar="RAY_ADDRESS", metavar="ADDRESS", help="Ray's head, such as head:6379."
        ),
    ],
    metadata_url: Annotated[
        str | None, typer.Option(envvar="RAYMELD_METADATA_URL", hidden=True)
    ] = None,
    debug: Debug = False,
) -> None:
    """Drain this spot machine before AWS or GCP takes it.

    Runs beside Ray on every spot machine, and waits for the cloud's notice.

    raymeld spot-notice --address head:6379
    """
    with answering(as_json=False, debug=debug):
        from cluster.metadata import METADATA_URL
        from cluster.spot_notice import watch
        from cluster.talk import Talk

        watch(address, Talk(quiet=False).say, metadata_url=metadata_url or METADATA_URL)


plan_commands.register(app)
app.add(merge, rich_help_panel=ONE_MERGE)
result_commands.register(app)
report_commands.register(app)
push_commands.register(app)
doctor_commands.register(app)
jobs_commands.register(app)
app.add(spot_notice, "spot-notice", rich_help_panel=CLUSTERS)
app.add(demo, rich_help_panel=ONE_MERGE)


def main() -> None:
    """Entry point of the ``raymeld`` command."""
    signal.signal(signal.SIGTERM, _interrupt)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup
        signal.signal(signal.SIGHUP, _interrupt)
    try:
        app()
    finally:
        gc.freeze()  # or Python, at exit, takes all of torch apart object by object: 0.3 s


def _interrupt(number: int, frame: Any) -> NoReturn:
    """SIGTERM and a closed terminal end a merge as Ctrl-C does: parts removed, workers stopped."""
    del number, frame
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()

"""The command line."""

from __future__ import annotations

import gc
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from cluster import (
    doctor_commands,
    jobs_commands,
    plan_commands,
    push_commands,
    recipe_commands,
    report_commands,
    result_commands,
)
from cluster.answering import answering
from cluster.help_screen import CLUSTERS, ONE_MERGE, WHAT, App
from cluster.hub_options import HubOptions
from cluster.option_groups import with_options
from cluster.options import Debug, Json, Quiet, refuse_workers
from cluster.plan_options import PlanOptions
from cluster.run_options import RunOptions
from cluster.words import Words, named_by
from merge_core import __version__

if TYPE_CHECKING:
    from cluster.talk import Talk
    from merge_core.merge import MergeResult
    from merge_core.plan import MergePlan
    from merge_core.stores.location import Location

app = App(
    help="""Fold PEFT LoRA adapters into Qwen1.5 checkpoints, on a Ray cluster or on this machine.

    raymeld plan Qwen1.5-7B my-lora                  # what would happen
    raymeld merge Qwen1.5-7B my-lora --out merged    # merge, verify, publish
    raymeld merge --help                             # each command has a screen
    """,
)


def _tell_version(asked: bool) -> None:
    if asked:
        typer.echo(f"raymeld {__version__}")
        raise typer.Exit


@app.callback()
def _whole(
    version: Annotated[
        bool,
        typer.Option(
            "--version", is_eager=True, callback=_tell_version, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    del version  # told before


@with_options(run=RunOptions, asked=PlanOptions, hub=HubOptions)
def merge(
    *,
    words: Words,
    run: RunOptions,
    asked: PlanOptions,
    hub: HubOptions,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", rich_help_panel=WHAT, help="Replace an earlier merge in OUT."),
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Merge adapters into BASE, or into the one that they name; verify, publish.

    raymeld merge Qwen1.5-7B my-lora other-lora@0.5 --out merged
    """
    with answering(as_json=as_json, debug=debug, out=run.out, resumes=True):
        from cluster import console
        from cluster.pools import find_pools
        from cluster.talk import Talk

        talk = Talk(quiet=quiet, out=run.out)
        target = hub.locate_out(run.out, asked.access)
        plan = asked.plan(*named_by(words, asked.access))
        for line in console.plan_lines(plan, find_pools(plan)):
            talk.say(line)
        with talk.progress():
            result = _merge(plan, target, run, talk, overwrite=overwrite)
        console.answer(
            console.result_lines(result, plan),
            console.result_document(result, plan),
            as_json=as_json,
        )


def _merge(
    plan: MergePlan, target: Location, run: RunOptions, talk: Talk, *, overwrite: bool
) -> MergeResult:
    if run.address == "inline":
        refuse_workers(run.workers, run.cpu_workers)
        from merge_core.merge import merge as merge_inline

        return merge_inline(
            plan,
            target,
            level=run.verify,
            device=run.device,
            overwrite=overwrite,
            watch=talk.watch,
            say=talk.say,
        )
    from cluster.driver import merge_on_ray
    from cluster.workers import ClusterOptions

    options = ClusterOptions(
        address=run.address,
        device=run.device,
        workers=run.workers,
        cpu_workers=run.cpu_workers,
        gpus_per_worker=run.gpus_per_worker,
        start_timeout=run.start_timeout,
    )
    return merge_on_ray(
        plan,
        target,
        options,
        level=run.verify,
        overwrite=overwrite,
        watch=talk.watch,
        say=talk.say,
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
recipe_commands.register(app)
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

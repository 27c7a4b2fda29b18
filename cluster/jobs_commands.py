"""The commands for merges that run as Ray Jobs: submit, and jobs list, logs, status and stop."""

from __future__ import annotations

import secrets
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from cluster.answering import answering
from cluster.help_screen import CLUSTERS, App
from cluster.interrupts import noted_interrupts
from cluster.job_watch import Watch
from cluster.jobs import STOP_SECONDS, Job, Jobs, connected, next_name
from cluster.log_lines import LogPrinter, log, logs_json
from cluster.merge_words import MergeWords, parse_merge, read_merge
from cluster.options import Debug, Json
from merge_core.errors import InputError, InterruptedMergeError, RaymeldError

DASHBOARD = "http://127.0.0.1:8265"
"""Where it is on the head itself, and at this end of ``ssh -L 8265:localhost:8265 head``."""

Address = Annotated[
    str,
    typer.Option(
        envvar=["RAY_API_SERVER_ADDRESS", "RAY_DASHBOARD_ADDRESS"],
        metavar="URL",
        help="The dashboard of the cluster's head.",
    ),
]
Words = Annotated[
    list[str], typer.Argument(metavar="MERGE", help="merge BASE ADAPTER ... --out OUT")
]
Name = Annotated[str, typer.Argument(metavar="JOB", help="As raymeld jobs list shows it.")]

_INTERRUPTED = InterruptedMergeError.exit_code


def register(app: App) -> None:
    """Add the commands to ``app``, which has the command ``merge``."""
    # What follows "merge" belongs to merge, with or without "--" before it.
    settings = {"allow_interspersed_args": False}
    app.add(submit, context_settings=settings, rich_help_panel=CLUSTERS)
    jobs = App(add_completion=False)
    jobs.add(list_jobs, "list")
    for command in (logs, status, stop):
        jobs.add(command)
    app.add_typer(
        jobs, name="jobs", help="List, read and stop submitted merges.", rich_help_panel=CLUSTERS
    )


def submit(
    context: typer.Context,
    words: Words,
    address: Address = DASHBOARD,
    wait: Annotated[bool, typer.Option(help="Print the log until the job has ended.")] = True,
    debug: Debug = False,
) -> None:
    """Run a merge on a Ray cluster, as a Ray Job.

    The raymeld that is running here goes along. Prints the job's log and ends with the exit code of
    its merge; with --no-wait, prints the job's name and leaves. Ctrl-C stops the job (130), a
    second one leaves without waiting for that; a closed terminal leaves it alone. The same merge
    is refused while it is under way (2).

    raymeld submit --address http://head:8265 -- merge /m/base /m/lora -o /m/out
    """
    parsed = parse_merge(words, context)
    with answering(as_json=False, debug=debug):
        merge = read_merge(words, parsed)
        with connected(address) as jobs:
            _warn_without_token(jobs)
            code = _run(jobs, merge, wait=wait)
    raise typer.Exit(code)


def list_jobs(address: Address = DASHBOARD, as_json: Json = False, debug: Debug = False) -> None:
    """List the merges of a cluster, the oldest first."""
    with answering(as_json=as_json, debug=debug):
        from cluster import console

        with connected(address) as jobs:
            found = jobs.all()
        lines = [f"{job.name}  {job.status:9}  {_times(job)}  {job.words}" for job in found]
        document = {"ok": True, "jobs": [_document(job) for job in found]}
        console.answer(lines or [f"no merge was submitted to {address}"], document, as_json=as_json)


def logs(
    name: Name,
    address: Address = DASHBOARD,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on until the job has ended.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Print what a job has said so far.

    With --follow, until it ends, with its exit code. Ctrl-C leaves; the job goes on. With
    RAYMELD_LOG=json the log is printed as it is: JSON lines.

    raymeld jobs logs --follow raymeld-1f0c52aa9be3-1
    """
    with answering(as_json=False, debug=debug), connected(address) as jobs:
        jobs.find(name)
        if follow:
            code = _follow(jobs, name)
        else:
            printer = LogPrinter(_print)
            printer.write(jobs.log(name))
            printer.close()
            code = 0
    raise typer.Exit(code)


def status(
    name: Name, address: Address = DASHBOARD, as_json: Json = False, debug: Debug = False
) -> None:
    """Tell how a job is doing.

    Exit code: that of its merge if it has ended (0 merged, 1 failed, 2 wrong input, 3 verification
    failed, 130 stopped); 0 too while it is alive.
    """
    with answering(as_json=as_json, debug=debug):
        from cluster import console

        with connected(address) as jobs:
            job = jobs.find(name)
        lines = [
            f"job      {job.name}",
            f"status   {job.status}" + f", exit code {job.exit_code}" * (not job.alive),
            f"started  {_times(job)}",
            f"runs     {job.words}",
            *[f"message  {job.message.strip()}"] * bool(job.message),
        ]
        console.answer(lines, _document(job), as_json=as_json)
    raise typer.Exit(job.exit_code or 0)


def stop(
    name: Name,
    address: Address = DASHBOARD,
    wait: Annotated[bool, typer.Option(help="Wait until it has stopped.")] = True,
    debug: Debug = False,
) -> None:
    """Stop a job.

    What it has not published yet, it does not publish. Exit code 0 once it has stopped (with
    --no-wait: once it was asked to), or had ended before.
    """
    with answering(as_json=False, debug=debug), connected(address) as jobs:
        if not jobs.find(name).alive:
            _say(f"job {name} had ended already")
            return
        with noted_interrupts() as interrupts:
            watch = Watch(jobs, name, _say, interrupts.heed)
            watch.stop()
            _say(_stopping(name))
            if wait:
                _say(_ended(watch.wait()))


def _run(jobs: Jobs, merge: MergeWords, *, wait: bool) -> int:
    """Submit ``merge`` and see it through; returns the exit code."""
    from cluster.wheel import assemble_wheel

    name = next_name(merge.recipe, jobs.all())
    submission = secrets.token_hex(8)
    with noted_interrupts() as interrupts:
        watch, printer = Watch(jobs, name, _say, interrupts.heed), LogPrinter(_print)
        try:
            with tempfile.TemporaryDirectory(prefix="raymeld-") as directory:
                wheel = assemble_wheel(Path(directory))
                interrupts.heed()
                jobs.submit(name, merge, wheel, submission)
            if not wait:
                print(name)
                _say(f"submitted; follow it with: raymeld jobs logs --follow {name}")
                return 0
            _say(f"job {name} submitted to {jobs.address}, with {wheel.name}")
            return _see_through(watch, printer)
        except KeyboardInterrupt:
            return _stop_own(jobs, watch, printer, name, submission)


def _follow(jobs: Jobs, name: str) -> int:
    """Print the log of a job, its own or somebody else's; returns its exit code."""
    with noted_interrupts() as interrupts:
        try:
            watch = Watch(jobs, name, _say, interrupts.heed)
            return _see_through(watch, LogPrinter(_print))
        except KeyboardInterrupt:
            _say(f"left; the job goes on, and stops with: raymeld jobs stop {name}")
            return _INTERRUPTED


def _see_through(watch: Watch, printer: LogPrinter) -> int:
    """Print the log until the job has ended, and how; returns its exit code."""
    job = watch.follow(printer.write)
    printer.close()
    return _ending(job)


def _stop_own(jobs: Jobs, watch: Watch, printer: LogPrinter, name: str, submission: str) -> int:
    """Ctrl-C: stop the job and see it end, unless it was never submitted."""
    try:
        if jobs.find(name).submission != submission:  # Ctrl-C came first, and then another
            return _INTERRUPTED
        _say(_stopping(name))
        watch.stop()
        _say("Ctrl-C again leaves without waiting for that")
        return _see_through(watch, printer)
    except InputError:
        _say("interrupted; nothing was submitted")
    except KeyboardInterrupt:
        _say(f"left; see whether it has stopped with: raymeld jobs status {name}")
    return _INTERRUPTED


def _ending(job: Job) -> int:
    """Say how a job ended; returns its exit code.

    Raises:
        RaymeldError: the driver did not end by itself, or never began.
    """
    if job.status == "FAILED" and job.driver_exit_code is None:
        what = " ".join(job.message.split()) or "Ray gives no reason"
        remedy = f"`raymeld jobs status {job.name}` shows it in lines."
        raise RaymeldError(f"Ray gave it up: {what[:500]}", f"job {job.name}", remedy)
    _say(_ended(job))
    return job.exit_code or 0


def _stopping(name: str) -> str:
    return f"stopping {name}, which has {STOP_SECONDS} s to clean up"


def _ended(job: Job) -> str:
    seconds = (job.ended or job.started) - job.started
    return f"job {job.name} {job.status} after {seconds:.0f} s, exit code {job.exit_code}"


def _times(job: Job) -> str:
    started = datetime.fromtimestamp(job.started, UTC).isoformat(timespec="seconds")
    return started if job.ended is None else f"{started}, {job.ended - job.started:.0f} s"


def _document(job: Job) -> dict[str, Any]:
    return {
        "ok": not job.exit_code,
        "job": job.name,
        "status": job.status,
        "exit_code": job.exit_code,
        "started": job.started,
        "ended": job.ended,
        "words": job.words,
        "message": job.message,
    }


def _warn_without_token(jobs: Jobs) -> None:
    if not jobs.token_known:
        _say(
            "warning: no token was found, so whoever reaches the cluster's dashboard can run"
            " programs there, as you do now. Start the cluster with RAY_AUTH_MODE=token, and put"
            " its token (`ray get-auth-token --generate`) into ~/.ray/auth_token there and here."
        )


def _print(piece: str) -> None:
    sys.stdout.write(piece)
    sys.stdout.flush()


def _say(line: str) -> None:
    if logs_json():
        log(line)
    else:
        print(line, file=sys.stderr, flush=True)

"""How a command ends: with its answer, or with one paragraph about what went wrong."""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
import traceback
from collections.abc import Iterator
from typing import NoReturn

import typer

from cluster.log_lines import log, logs_json, refuse_unknown_form
from merge_core.errors import InterruptedMergeError, RaymeldError, refuse


@contextlib.contextmanager
def answering(
    *, as_json: bool, debug: bool, out: object | None = None, resumes: bool = False
) -> Iterator[None]:
    """Turn what goes wrong inside into one paragraph and an exit code.

    Args:
        out: what the command is about, for who looks for that in a log.
        resumes: the same command, after Ctrl-C, goes on where this one stopped.
    """
    try:
        refuse_unknown_form()
        _refuse_deleted_directory()
        yield
    except KeyboardInterrupt:
        error: RaymeldError = InterruptedMergeError("interrupted", "", _way_on() * resumes)
    except RaymeldError as raised:
        error = raised
        _trace(debug=debug)
    except (typer.Exit, typer.Abort):
        raise
    except Exception as raised:  # noqa: BLE001 - a bug of ours, told as one
        _trace(debug=debug)
        reason = f"{type(raised).__name__}: {raised}"
        error = RaymeldError(f"unexpected {reason}", "", "Run it with --debug and report it.")
    else:
        return
    from cluster import console

    with contextlib.suppress(RaymeldError):  # stdout cannot be written to: stderr has it all
        console.complain(error, as_json=as_json, out=out)
    raise typer.Exit(error.exit_code)


def end(code: int, why: str, out: object | None = None) -> NoReturn:
    """End a command whose answer, on stdout, is bad news; a log of lines has them as an error."""
    if logs_json():
        log(why, level="error", exit_code=code, out=out)
    raise typer.Exit(code)


def _way_on() -> str:
    command = shlex.join(["raymeld", *sys.argv[1:]])
    return f"What is finished stays, unpublished. Go on with:\n  {command}"


def _trace(*, debug: bool) -> None:
    if debug:
        with contextlib.suppress(OSError):
            traceback.print_exc()


def _refuse_deleted_directory() -> None:
    """Neither Ray nor torch's libraries start there."""
    try:
        os.getcwd()
    except FileNotFoundError:
        remedy = "Change to one that exists"
        raise refuse("this directory was deleted", "working directory", remedy) from None

"""How a command ends: with its answer, or with one paragraph about what went wrong."""

from __future__ import annotations

import contextlib
import sys
import traceback
from collections.abc import Iterator

import typer

from merge_core.errors import InterruptedMergeError, RaymeldError


@contextlib.contextmanager
def answering(*, as_json: bool, debug: bool) -> Iterator[None]:
    """Turn what goes wrong inside into one paragraph and an exit code."""
    try:
        yield
    except KeyboardInterrupt:
        error: RaymeldError = InterruptedMergeError(
            "interrupted",
            "",
            "A merge whose OUT has no config.json was not published; the same command goes on.",
        )
    except RaymeldError as raised:
        error = raised
        if debug:
            traceback.print_exc()
    except (typer.Exit, typer.Abort):
        raise
    except Exception as raised:  # noqa: BLE001 - a bug of ours, told as one
        if debug:
            traceback.print_exc()
        reason = f"{type(raised).__name__}: {raised}"
        error = RaymeldError(f"unexpected {reason}", "", "Run it with --debug and report it.")
    else:
        return
    from cluster import console

    console.complain(error, as_json=as_json)
    sys.stdout.flush()
    raise typer.Exit(error.exit_code)

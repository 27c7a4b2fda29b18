"""``raymeld status --watch``: a merge that runs elsewhere, as it happens, from OUT alone."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from cluster.estimate_report import duration
from cluster.status import QUIET_SECONDS, Status, read_status
from merge_core.errors import counted
from merge_core.stores.location import Location

LOOK_SECONDS = 2.0
"""Between two looks: a merge writes down how far it is once a second, and each look lists the
lease's folder, which on a network file system or a store is a request."""

LINE_SECONDS = 10.0
"""How often a line is printed where there is no terminal."""

SHOWN_LINES = 5
"""Of the decisions on the way."""

_FIXED_ROWS = 6
"""Of the screen, for all but workers and decisions."""

_NARROW = 100
"""Columns below which the workers' devices give way to what they are at."""


def watch_status(out: Location, console: Console) -> Status:
    """Show the merge in ``out`` until it ends; the last status, which is not shown.

    Args:
        console: a terminal shows a view that changes in place, anything else a line now and then.

    Raises:
        InputError: it holds no merge of raymeld's.
    """
    status = read_status(out)
    if not console.is_terminal:
        return _print_lines(status, console)
    with Live(console=console, transient=True, auto_refresh=False) as live:
        while status.state == "running":
            live.update(view(status, console.width, console.height), refresh=True)
            time.sleep(LOOK_SECONDS)
            status = read_status(out)
    return status


def view(status: Status, width: int, height: int) -> RenderableType:
    """What fits into a terminal of so many columns and rows."""
    progress = status.progress
    parts: list[RenderableType] = [_line("running  ", f"{status.out}, by {status.holder}")]
    if not progress:
        return Group(*parts, _line("phase    ", "starting"))
    done, total = progress["done"], progress["total"]
    bar = Table.grid(padding=(0, 1))
    bar.add_row(
        Text(f"{progress['phase']:<8}", style="bold"),
        ProgressBar(total=total or 1, completed=done, width=max(10, width // 3)),
        Text(f"{done / 1e9:.2f} of {total / 1e9:.2f} GB"),
        Text(_left(status)),
    )
    lines = progress["lines"][-SHOWN_LINES:]
    room = max(1, height - _FIXED_ROWS - len(lines))
    parts += [_line("shards   ", f"{status.done} of {status.shards} done"), bar]
    parts += [Text(), _workers(progress["workers"], width, room), Text()]
    for when, line in lines:
        parts.append(_line(time.strftime("%H:%M:%S ", time.localtime(when)), line))
    quiet = time.time() - progress["written"]
    if quiet > QUIET_SECONDS:
        parts.append(_line("note     ", f"nothing was heard for {duration(quiet)}", style="yellow"))
    return Group(*parts)


def _workers(workers: list[dict[str, Any]], width: int, room: int) -> Table:
    table = Table.grid(padding=(0, 1))
    table.add_column(no_wrap=True)
    if width >= _NARROW:
        table.add_column(no_wrap=True, overflow="ellipsis", max_width=width // 3)
    table.add_column(no_wrap=True, overflow="ellipsis", max_width=width // 2)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True, justify="right")
    shown = workers if len(workers) <= room else workers[: room - 1]
    for worker in shown:
        size, done = worker["size"], worker["done"]
        cells: list[RenderableType] = [Text(worker["worker"])]
        if width >= _NARROW:
            cells.append(Text(worker["device"], style="dim"))
        cells.append(Text(worker["doing"].removesuffix(".safetensors")))
        cells.append(ProgressBar(total=size, completed=done, width=12) if size else Text())
        cells.append(Text(f"{done / size:.0%}" if size else ""))
        table.add_row(*cells)
    if len(shown) < len(workers):
        table.add_row(Text(f"and {len(workers) - len(shown)} more", style="dim"))
    return table


def _line(label: str, text: str, style: str = "") -> Text:
    """One row of the screen, whatever it holds."""
    line = Text(no_wrap=True, overflow="ellipsis")
    return line.append(label, style="bold").append(text, style=style)


def _left(status: Status) -> str:
    left = status.seconds_left
    return "" if left is None else f"about {duration(left)} left"


def _print_lines(status: Status, console: Console) -> Status:
    """The decisions as they are made, and how far it is now and then."""
    printed, told = -LINE_SECONDS, 0.0
    while status.state == "running":
        lines = status.progress.get("lines", [])
        for when, line in lines:
            if when > told:
                console.print(line, markup=False, soft_wrap=True)
        told = max([told, *(when for when, _ in lines)])
        if status.progress and time.monotonic() - printed >= LINE_SECONDS:
            printed = time.monotonic()
            console.print(_now(status), markup=False, soft_wrap=True)
        time.sleep(LOOK_SECONDS)
        status = read_status(status.out)
    return status


def _now(status: Status) -> str:
    progress, left = status.progress, _left(status)
    done, total = progress["done"] / 1e9, progress["total"] / 1e9
    parts = [
        f"{progress['phase']}: {done:.2f} of {total:.2f} GB",
        f"{status.done} of {counted(status.shards, 'shard')}",
        *[counted(len(progress["workers"]), "worker")] * bool(progress["workers"]),
        *[left] * bool(left),
    ]
    return ", ".join(parts)

"""``raymeld status``: what a running or stopped merge has done, from what lies in OUT alone."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from itertools import chain
from typing import Any

from cluster.estimate_report import duration
from merge_core.errors import StorageError, refuse
from merge_core.holder import Holder
from merge_core.hub_model import refuse_recordless
from merge_core.lease import live_holder
from merge_core.output import PLAN, accepted_shards
from merge_core.progress import read_progress
from merge_core.side_files import CONFIG
from merge_core.stages import layers_among
from merge_core.stores.location import Location
from merge_core.stores.opening import is_there, read_file
from merge_core.upload import destination_of, published_at

SHOWN_LINES = 10
"""Of the decisions on the way; ``--json`` has them all."""


QUIET_SECONDS = 30.0
"""A driver writes every second; a clock may be off by some seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """What is known of a merge."""

    out: Location
    state: str
    """``running``, ``finished`` or ``stopped``."""
    fingerprint: str
    shards: int
    done: int
    """Shards that were accepted; all of them once it is finished."""
    missing: str
    """The layers in the others, as ``--layers`` takes them."""
    holder: Holder | None
    """Who is at work."""
    progress: dict[str, Any]
    """See ``read_progress``; empty if none was kept."""
    model: Location | None = None
    """On the hub, if ``out`` is the state of a merge that goes there."""
    url: str | None = None
    """Of the commit there that has it."""

    @property
    def seconds_left(self) -> float | None:
        """Of the present phase, at the pace of this phase so far; None where that is unknown."""
        if self.state != "running" or not self.progress:
            return None
        new = self.progress["done"] - self.progress["before"]
        spent = self.progress["written"] - self.progress["began"]
        if new <= 0 or spent <= 0:
            return None
        return float((self.progress["total"] - self.progress["done"]) * spent / new)


def read_status(out: Location) -> Status:
    """Look at ``out``; may be called at any time, from anywhere that sees it.

    Raises:
        InputError: it holds no merge of raymeld's.
    """
    try:
        plan = json.loads(read_file(out / PLAN))
        shards, fingerprint = plan["shards"], plan["fingerprint"]
        tensors = [[task["target"]["name"] for task in shard["tasks"]] for shard in shards]
    except (StorageError, ValueError, KeyError, TypeError):
        refuse_recordless(out)
        remedy = "Name the --out or --state of one that was started; it is seen once its Ray is up"
        raise refuse("there is no merge", str(out), remedy) from None
    holder, finished = live_holder(out), is_there(out / CONFIG)
    accepted = accepted_shards(out)
    model = destination_of(out)
    left = [names for n, names in enumerate(tensors) if n not in accepted]
    return Status(
        out=out,
        state="running" if holder else "finished" if finished else "stopped",
        fingerprint=fingerprint,
        shards=len(shards),
        done=len(shards) if finished else len(accepted),
        missing="" if finished else layers_among(chain.from_iterable(left)),
        holder=holder,
        progress=read_progress(out) or {},
        model=model,
        url=None if model is None else published_at(model),
    )


def status_lines(status: Status) -> list[str]:
    """A status as a person reads it."""
    lines = [
        f"{status.state:<8} {status.out}, plan {status.fingerprint[:12]}",
        f"shards   {status.done} of {status.shards} done",
    ]
    if status.model is not None:
        lines.append(f"onto     {status.url or status.model}")
    if status.state == "stopped":
        lines.append("next     the same merge command again goes on from here")
        if status.missing:
            lines.append(f"missing  --layers {status.missing}; a stage must name some of these")
    if status.holder is not None:
        lines.insert(1, f"by       {status.holder}")
        lines += _running_lines(status)
    for when, line in status.progress.get("lines", [])[-SHOWN_LINES:]:
        lines.append(f"{time.strftime('%H:%M:%S', time.localtime(when))} {line}")
    return lines


def status_document(status: Status) -> dict[str, Any]:
    """A status as programs read it."""
    holder = status.holder
    return {
        "ok": True,
        "out": str(status.out),
        "model": str(status.model) if status.model else None,
        "url": status.url,
        "state": status.state,
        "fingerprint": status.fingerprint,
        "shards": status.shards,
        "done": status.done,
        "missing_layers": status.missing,
        "seconds_left": status.seconds_left,
        "by": {"host": holder.host, "pid": holder.pid} if holder else None,
        "progress": status.progress,
    }


def _running_lines(status: Status) -> list[str]:
    progress = status.progress
    if not progress:
        return ["phase    starting"]
    left = status.seconds_left
    eta = f", about {duration(left)} left" if left is not None else ""
    done, total = progress["done"] / 1e9, progress["total"] / 1e9
    lines = [f"phase    {progress['phase']}, {done:.2f} of {total:.2f} GB{eta}"]
    for worker in progress["workers"]:
        share = f" {worker['done'] / worker['size']:.0%}" if worker["size"] else ""
        lines.append(f"{worker['worker']:<8} {worker['device']}: {worker['doing']}{share}")
    quiet = time.time() - progress["written"]
    if quiet > QUIET_SECONDS:
        lines.append(f"note     nothing was heard for {duration(quiet)}")
    return lines

"""A checkup and its diagnosis, as a person and as programs read them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from actors.examiner import DeviceView, Examination, ExaminedNode, PathSight, Silence
from actors.identity import Identity
from actors.libraries import Library
from cluster.console import gb
from cluster.diagnosis import in_slices, room_on_gpu, visible_gpus
from cluster.doctor import Checkup
from cluster.findings import Diagnosis, Finding
from cluster.pools import EligiblePool, cpu_pool
from merge_core.errors import counted, some_of
from merge_core.reachable import InputSight, ScratchSight
from merge_core.upload import kept_in

SHOWN_LIBRARIES = ("torch", "ray", "transformers", "peft", "safetensors")
"""In the text; the document has all."""

UNBROKEN = 10_000
"""Columns where there is no terminal: a log keeps each path in one piece, however long the line."""


def report_lines(checkup: Checkup, diagnosis: Diagnosis) -> list[str]:
    """What a person reads: what was looked at, a row a node, and the problems at the end."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=UNBROKEN)
    with console.capture() as shown:
        for table in (
            _grid(_head(checkup)),
            _node_table(checkup),
            *_device_tables(checkup),
            _grid(_ending(diagnosis)),
        ):
            if table.row_count:
                console.print(table)
                console.print()
    return [line.rstrip() for line in shown.get().rstrip().splitlines()]


def _head(checkup: Checkup) -> Iterator[tuple[str, str]]:
    driver = checkup.driver
    if checkup.on_ray:
        nodes, token = counted(len(checkup.nodes), "node"), "a" if checkup.token else "no"
        yield "cluster", f"{checkup.address}: {nodes}, {token} token in use"
    else:
        yield "machine", f"{driver.host}, without Ray"
    versions = [f"raymeld {driver.raymeld}", f"Python {driver.python}"]
    named = {library.name: library.found for library in checkup.libraries}
    versions += [f"{name} {named[name]}" for name in SHOWN_LIBRARIES if named.get(name)]
    yield "software", ", ".join(versions)
    yield "code", some_of(sorted({str(Path(path).parent) for path in driver.paths}))
    for number, sight in enumerate(checkup.inputs):
        yield "ADAPTER" if number else "BASE", f"{sight.path}: {_seen(sight)}"
    if checkup.destination is not None:
        yield "OUT", _destination(checkup)


def _seen(sight: InputSight) -> str:
    if sight.error:
        return sight.error
    size = sum(file.identity.size for file in sight.files)
    return f"{counted(len(sight.files), 'file')}, {gb(size)}"


def _destination(checkup: Checkup) -> str:
    found, plan = checkup.destination, checkup.plan
    assert found is not None
    kept = kept_in(found.out)
    verb = "needed" if kept == found.out else "to be sent"
    parts = [] if kept == found.out else [f"state in {kept}"]
    parts += [] if found.place in (None, kept) else [f"to be made in {found.place}"]
    parts += [] if found.free is None else [f"{gb(found.free)} free"]
    parts += [] if plan is None else [f"{gb(sum(s.size for s in plan.shards))} {verb}"]
    return f"{found.out}: {', '.join(parts)}" if parts else str(found.out)


def _node_table(checkup: Checkup) -> Table:
    """A row a node; code and CPUs are a matter of clusters."""
    ray = ["code", "CPUs"] if checkup.on_ray else []
    paths = [*("BASE", "ADAPTER")[: len(checkup.inputs)], *["OUT"] * bool(checkup.destination)]
    paths += ["scratch"] * _goes_to_hub(checkup)
    table = _table("node", *ray, "memory free", *["lanes"] * bool(checkup.plan), *paths)
    for node in checkup.nodes:
        found = node.examination
        cells = [node.name]
        if not isinstance(found, Examination):
            state = "other" if isinstance(found, Identity) else "silent"
            _add(table, [node.name, "leaves" if found is None else state])
            continue
        if checkup.on_ray:
            code = "other" if found.identity.difference(checkup.driver) else "same"
            cells += [code, str(node.ray_cpus)]
        cells.append(gb(found.memory))
        if checkup.plan:
            cells.append(_lanes(cpu_pool(checkup.plan, found.memory)))
        _add(table, [*cells, *_path_cells(node, checkup)])
    return table


def _path_cells(node: ExaminedNode, checkup: Checkup) -> Iterator[str]:
    if not isinstance(node.paths, PathSight):
        return
    pairs = zip(node.paths.inputs, checkup.inputs, strict=True)
    states = [_state(sight, driver, checkup) for sight, driver in pairs]
    for group in filter(None, (states[:1], states[1:])):
        yield min(group, key=_STATES.index)
    if checkup.destination:
        refused = checkup.destination.refusal or node.paths.refusal
        yield "refused" if refused else "writable" if node.arrived else "elsewhere"
    if node.paths.scratch is not None:
        yield "refused" if node.paths.scratch.room is None else gb(node.paths.scratch.room)


def _goes_to_hub(checkup: Checkup) -> bool:
    return checkup.destination is not None and checkup.destination.out.upload is not None


_STATES = ("unreadable", "differs", "readable", "same")
"""The worst first: several adapters share a column."""


def _state(sight: InputSight, driver: InputSight, checkup: Checkup) -> str:
    if sight.error:
        return "unreadable"
    if driver.error or not checkup.on_ray:
        return "readable"
    return "differs" if sight.difference(driver) else "same"


def _device_tables(checkup: Checkup) -> Iterator[Table]:
    """What workers see of GPUs, and how full these are; nothing where there are none."""
    views = _table("node", "GPUs", "GPU workers see", "CPU workers see", "torch says")
    gpus = _table("node", "GPU", "free", *["lanes"] * bool(checkup.plan), "taken by")
    for node in checkup.nodes:
        found = node.examination
        if not isinstance(found, Examination) or not (node.ray_gpus or found.gpus):
            continue
        seen = [view for view in node.views if isinstance(view, DeviceView)]
        said = dict.fromkeys(view.device or f"no: {view.trouble}" for view in seen or [found.view])
        number = node.ray_gpus if checkup.on_ray else len(found.gpus)
        workers = ", ".join(_visible(view) for view in seen) or "-"
        _add(views, [node.name, str(number), workers, _visible(found.view), "; ".join(said)])
        whole = visible_gpus(node, found)
        unseen = "in slices" if in_slices(node, found) else "hidden"
        for sight in found.gpus:
            cells = [node.name, f"{sight.gpu.index} {sight.gpu.name}", gb(sight.gpu.free)]
            if checkup.plan:
                room = room_on_gpu(checkup.plan, found, sight)
                cells.append(_lanes(room) if sight in whole else unseen)
            _add(gpus, [*cells, ", ".join(map(str, sight.processes))])
    yield views
    yield gpus


def _visible(view: DeviceView) -> str:
    return "all" if view.visible is None else view.visible or "none"


def _lanes(room: EligiblePool) -> str:
    return str(room.lanes) if room.eligible else "too full"


def _ending(diagnosis: Diagnosis) -> Iterator[tuple[str, str]]:
    for note in diagnosis.notes:
        yield "note", str(note)
    for problem in diagnosis.problems:
        yield "problem", str(problem)
    number = len(diagnosis.problems)
    yield "result", f"{counted(number, 'problem')} to solve" if number else "no problem was found"


def _grid(rows: Iterable[tuple[str, str]]) -> Table:
    """Labels, and texts that keep to the right of them."""
    grid = Table.grid(padding=(0, 2, 0, 0))
    for label, text in rows:
        grid.add_row(Text(label, style="bold red" if label == "problem" else "bold"), Text(text))
    return grid


def _table(*headings: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in headings:
        table.add_column(heading)
    return table


def _add(table: Table, cells: Sequence[str]) -> None:
    table.add_row(*(Text(cell) for cell in cells))


def report_document(checkup: Checkup, diagnosis: Diagnosis) -> dict[str, Any]:
    """What programs read."""
    plan, destination = checkup.plan, checkup.destination
    return {
        "ok": not diagnosis.problems,
        "address": checkup.address,
        "token": checkup.token,
        "driver": {
            **dataclasses.asdict(checkup.driver),
            "libraries": _versions(checkup.libraries),
            "inputs": [_input(sight, sight) for sight in checkup.inputs],
            "out": destination and {"path": str(destination.out), "free": destination.free},
        },
        "plan": plan and {"bytes": sum(s.size for s in plan.shards), "shards": len(plan.shards)},
        "nodes": [_node(node, checkup) for node in checkup.nodes],
        "problems": [_finding(problem) for problem in diagnosis.problems],
        "notes": [_finding(note) for note in diagnosis.notes],
    }


def _node(node: ExaminedNode, checkup: Checkup) -> dict[str, Any]:
    leaves_in, found, paths = node.leaves_in, node.examination, node.paths
    document: dict[str, Any] = {
        "name": node.name,
        "leaving": leaves_in is not None,
        "leaves_in": leaves_in if leaves_in is not None and math.isfinite(leaves_in) else None,
        "cpus_of_ray": node.ray_cpus,
        "gpus_of_ray": node.ray_gpus,
        "gpus_taken": node.taken,
        "gpu_workers": [dataclasses.asdict(view) for view in node.views],
        "silence": next((one.reason for one in (found, paths) if isinstance(one, Silence)), None),
    }
    if isinstance(found, Identity):
        document |= _who(found, checkup.driver)
    if isinstance(found, Examination):
        document |= _who(found.identity, checkup.driver)
        document |= _found(node, found, checkup)
    if isinstance(paths, PathSight):
        pairs = zip(paths.inputs, checkup.inputs, strict=True)
        document["inputs"] = [_input(sight, driver) for sight, driver in pairs]
        document["out"] = {"refusal": paths.refusal, "arrived": node.arrived}
        document["scratch"] = paths.scratch and _scratch(paths.scratch)
    return document


def _who(identity: Identity, driver: Identity) -> dict[str, Any]:
    return {"identity": dataclasses.asdict(identity), "difference": identity.difference(driver)}


def _found(node: ExaminedNode, found: Examination, checkup: Checkup) -> dict[str, Any]:
    plan = checkup.plan
    return {
        "libraries": _versions(found.libraries),
        "memory": found.memory,
        "lanes": cpu_pool(plan, found.memory).lanes if plan else None,
        "cpu_worker": dataclasses.asdict(found.view),
        "gpus": [
            {
                **dataclasses.asdict(sight.gpu),
                "hidden": not in_slices(node, found) and sight not in visible_gpus(node, found),
                "lanes": room_on_gpu(plan, found, sight).lanes if plan else None,
                "processes": [dataclasses.asdict(process) for process in sight.processes],
            }
            for sight in found.gpus
        ],
    }


def _input(sight: InputSight, driver: InputSight) -> dict[str, Any]:
    return {
        "path": str(sight.path),
        "files": len(sight.files),
        "error": sight.error,
        "difference": None if sight.error or driver.error else sight.difference(driver),
    }


def _scratch(sight: ScratchSight) -> dict[str, Any]:
    return {
        "path": sight.folder,
        "room": sight.room,
        "in_memory": bool(sight.memory),
        "refusal": None if sight.refusal is None else sight.refusal.what,
    }


def _versions(libraries: Sequence[Library]) -> dict[str, str | None]:
    return {library.name: library.found for library in libraries}


def _finding(finding: Finding) -> dict[str, Any]:
    return {"what": finding.what, "places": list(finding.places), "remedy": finding.remedy}

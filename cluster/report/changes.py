"""By how much which weights changed: the heat map of layers and modules, and each tensor."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from cluster.report.evidence import Row
from cluster.report.tables import Column, Table, rounded
from merge_core.shards import layer_of

_EXPERT = re.compile(r"\.experts\.\d+\.")
"""One column for all experts of a layer: a heat map of sixty times as many shows nothing."""

_LAYER = re.compile(r"\.\d+\.")


@dataclass(slots=True)
class Cell:
    """The tensors of one module in one layer; several where they are experts."""

    deltas: list[float] = field(default_factory=list)
    bases: list[float] = field(default_factory=list)

    @property
    def relative_change(self) -> float | None:
        """Norm of all deltas relative to the norm of all bases."""
        base = math.hypot(*self.bases)
        return math.hypot(*self.deltas) / base if base else None


@dataclass(frozen=True, slots=True, kw_only=True)
class HeatMap:
    """Relative changes by layer and module."""

    layers: tuple[int, ...]
    """From the first with a change to the last, those between that have none as well."""
    modules: tuple[str, ...]
    cells: tuple[tuple[int, int, float, int], ...]
    """Place in ``layers``, place in ``modules``, relative change, number of tensors."""

    @property
    def table(self) -> Table:
        """The same in rows."""
        columns = [Column("Layer", "number"), *(Column(name, "percent") for name in self.modules)]
        values = {(x, y): change for x, y, change, _ in self.cells}
        rows = [
            [layer, *(values.get((x, y)) for y in range(len(self.modules)))]
            for x, layer in enumerate(self.layers)
        ]
        return Table(columns=columns, rows=rows)


def changed(tensors: Iterable[Row]) -> list[Row]:
    """The tensors whose change is known, the most changed first."""
    rows = [row for row in tensors if row["relative_change"] is not None]
    return sorted(rows, key=lambda row: (-row["relative_change"], row["tensor"]))


def whole_change(tensors: Iterable[Row]) -> float | None:
    """Norm of all deltas relative to the norm of all tensors that got one."""
    cell = Cell()
    for row in changed(tensors):
        cell.deltas.append(row["delta_norm"])
        cell.bases.append(row["base_norm"])
    return cell.relative_change


def heat_map(tensors: Iterable[Row]) -> HeatMap:
    """Every tensor of a layer that got a delta."""
    cells: dict[tuple[int, str], Cell] = defaultdict(Cell)
    for row in changed(tensors):
        layer = layer_of(row["tensor"])
        if layer is not None:
            cell = cells[layer, module_of(row["tensor"])]
            cell.deltas.append(row["delta_norm"])
            cell.bases.append(row["base_norm"])
    there = [layer for layer, _ in cells]
    layers = range(min(there, default=0), max(there, default=-1) + 1)  # a gap is seen as one
    modules = sorted({module for _, module in cells})
    return HeatMap(
        layers=tuple(layers),
        modules=tuple(modules),
        cells=tuple(
            (layers.index(layer), modules.index(module), rounded(change), len(cell.deltas))
            for (layer, module), cell in sorted(cells.items())
            if (change := cell.relative_change) is not None
        ),
    )


def module_of(tensor: str) -> str:
    """What a tensor is called in every layer: ``self_attn.q_proj``, ``mlp.experts.*.up_proj``."""
    name = _EXPERT.sub(".experts.*.", tensor)
    return _LAYER.split(name, maxsplit=1)[-1].removesuffix(".weight")


def tensor_table(tensors: Sequence[Row]) -> Table:
    """Every tensor that is done, the most changed first."""
    first = changed(tensors)
    names = {row["tensor"] for row in first}
    rows: list[list[Any]] = [
        [
            row["tensor"],
            row["action"],
            _of(row["relative_change"]),
            _of(row["delta_norm"]),
            _of(row["largest_change"]),
            row["dtype"],
            " x ".join(map(str, row["shape"])),
            row["nbytes"],
            row["file"],
            row["worker"],
            row["digest"],
        ]
        for row in (*first, *(row for row in tensors if row["tensor"] not in names))
    ]
    columns = [
        Column("Tensor", "name"),
        Column("What was done", "choice"),
        Column("Relative change", "percent"),
        Column("Norm of the delta", "real"),
        Column("Largest change", "real"),
        Column("Dtype"),
        Column("Shape"),
        Column("Size", "bytes"),
        Column("File", "name"),
        Column("Worker"),
        Column("Digest", "name"),
    ]
    return Table(columns=columns, rows=rows)


def _of(value: float | None) -> float | None:
    return None if value is None else rounded(value)

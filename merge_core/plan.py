"""The plan: the whole output and all the work, decided from headers alone.

Everything that changes a byte of the result is decided here and covered by the fingerprint;
lanes, sizes of reads and the number of workers are not, and change nothing.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from merge_core.layout import DTYPE_BYTES, FileLayout, TensorSpec, lay_out
from merge_core.storage import FileIdentity
from merge_core.updates import Update
from merge_core.updates.tuning import Tuning


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where a tensor's values come from, before any update."""

    tensor: TensorSpec
    file: int | None
    """Index into ``MergePlan.base_files``; None: an adapter brings the whole tensor."""
    adapter: int | None = None
    """Index into ``MergePlan.adapters``, then."""

    @property
    def dtype_bytes(self) -> int:
        """Bytes an element."""
        return DTYPE_BYTES[self.tensor.dtype]


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorTask:
    """How one output tensor comes about."""

    target: TensorSpec
    source: Source
    updates: tuple[Update, ...]

    @property
    def action(self) -> str:
        """``merged``, ``replaced`` by the adapter's, ``converted`` to another dtype, or ``copied``
        as bytes.
        """
        if self.updates:
            return "merged"
        if self.source.adapter is not None:
            return "replaced"
        return "copied" if self.as_bytes else "converted"

    @property
    def as_bytes(self) -> bool:
        """Whether it is carried over undecoded."""
        return not self.updates and self.source.tensor.dtype == self.target.dtype

    @property
    def whole_rows(self) -> bool:
        """Whether rows are made anew, each of them as a whole."""
        return any(update.kind in ("dora", "through_peft") for update in self.updates)

    @property
    def column_norms(self) -> bool:
        """Whether the norm of each column is taken before the first element is merged."""
        return any(update.kind == "dora" and update.delta.transposed for update in self.updates)

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and width of the target, of which a vector is a column and the experts of a fused
        tensor lie one below the other.
        """
        *rows, width = self.target.shape or (1,)
        return (math.prod(rows), width) if rows else (width, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """One output file."""

    index: int
    name: str
    size: int
    """Bytes of the whole file."""
    tasks: tuple[TensorTask, ...]
    """In file order."""
    device: str | None = None
    """``cuda`` or ``cpu`` where a device map says so; its last bits may depend on it."""

    def layout(self) -> FileLayout:
        """Header and offsets of the file."""
        return lay_out((t.target.name, t.target.dtype, t.target.shape) for t in self.tasks)


@dataclass(frozen=True, slots=True, kw_only=True)
class Twins:
    """Two tensors of adapters that must hold the same values."""

    one: tuple[int, TensorSpec]
    """Index into ``MergePlan.adapters``, and the tensor there."""
    other: tuple[int, TensorSpec]
    transposed: bool = False
    """The other one is the transpose."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterInput:
    """An adapter as the workers need it."""

    path: Path
    weight: float
    peft_type: str
    file: FileIdentity
    config_file: FileIdentity
    digests: Mapping[str, str]
    """Of the tensors that are used, by name; empty until ``factors.seal`` has read and checked
    them all."""
    tuning: Tuning | None = None
    """What PEFT is to merge of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MergePlan:
    """The whole output of a merge, known before any arithmetic."""

    base: Path
    base_files: tuple[FileIdentity, ...]
    header_digests: tuple[str, ...]
    config: Mapping[str, Any]
    """The base's config.json."""
    config_changes: Mapping[str, Any]
    """Fields of config.json that the merge changes; empty means: copied byte for byte."""
    side_files: tuple[FileIdentity, ...]
    adapters: tuple[AdapterInput, ...]
    twins: tuple[Twins, ...]
    keep_tied: bool
    """Whether tied embeddings and head were to stay one tensor, whatever was trained of either."""
    added: tuple[str, ...]
    """Tensors that the base does not have: a head that is untied."""
    shards: tuple[Shard, ...]
    notes: tuple[str, ...]

    @property
    def tasks(self) -> Iterator[TensorTask]:
        """Every tensor of the output, shard after shard."""
        return (task for shard in self.shards for task in shard.tasks)

    @property
    def pinned(self) -> set[str]:
        """The devices that some shards ask for."""
        return {shard.device for shard in self.shards if shard.device is not None}

    @property
    def total_size(self) -> int:
        """Bytes of all tensors, as the index states it."""
        return sum(task.target.nbytes for task in self.tasks)

    @property
    def fingerprint(self) -> str:
        """sha256 over everything that changes bytes. Needs a sealed plan."""
        if not all(adapter.digests for adapter in self.adapters):
            raise ValueError("the plan is not sealed: its adapters have not been read")
        covered = {
            "base": [[f.name, f.size] for f in self.base_files],
            "headers": self.header_digests,
            "config": [self.config, self.config_changes],
            "side_files": [[f.name, f.size] for f in self.side_files],
            "adapters": [[a.weight, dict(a.digests)] for a in self.adapters],
            "tunings": [asdict(a.tuning) if a.tuning else None for a in self.adapters],
            "shards": [asdict(shard) for shard in self.shards],
        }
        text = json.dumps(covered, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

"""The plan: the whole output and all the work, decided from headers alone.

Everything that changes a byte of the result is decided here and covered by the fingerprint;
lanes, sizes of reads and the number of workers are not, and change nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from merge_core.layout import FileLayout, TensorSpec, lay_out
from merge_core.storage import FileIdentity


@dataclass(frozen=True, slots=True, kw_only=True)
class LowRankUpdate:
    """Adds scaling * B @ A to a tensor."""

    adapter: int
    """Index into ``MergePlan.adapters``."""
    a: TensorSpec
    b: TensorSpec
    scaling: float
    """alpha / r (or alpha / sqrt(r)) times the adapter's weight."""
    transposed: bool
    """The base stores [in, out] (a Conv1D layer), so the delta is transposed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorTask:
    """How one output tensor comes about."""

    target: TensorSpec
    source: TensorSpec
    source_file: int
    """Index into ``MergePlan.base_files``."""
    updates: tuple[LowRankUpdate, ...]

    @property
    def action(self) -> str:
        """``merged``, ``converted`` to another dtype, or ``copied`` as bytes."""
        if self.updates:
            return "merged"
        return "copied" if self.source.dtype == self.target.dtype else "converted"


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
class SavedCopy:
    """A base tensor that an adapter carries along, and where the base itself holds it."""

    copy: TensorSpec
    source: TensorSpec
    source_file: int
    """Index into ``MergePlan.base_files``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterInput:
    """An adapter as the workers need it."""

    path: Path
    weight: float
    file: FileIdentity
    config_file: FileIdentity
    factor_digests: Mapping[str, str]
    """By tensor name; empty until ``factors.seal`` has read and checked the whole file."""
    copies: tuple[SavedCopy, ...] = ()


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
        if not all(adapter.factor_digests for adapter in self.adapters):
            raise ValueError("the plan is not sealed: its adapters have not been read")
        covered = {
            "base": [[f.name, f.size] for f in self.base_files],
            "headers": self.header_digests,
            "config": [self.config, self.config_changes],
            "side_files": [[f.name, f.size] for f in self.side_files],
            "adapters": [[a.weight, dict(a.factor_digests)] for a in self.adapters],
            "shards": [asdict(shard) for shard in self.shards],
        }
        text = json.dumps(covered, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

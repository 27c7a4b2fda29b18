"""The plan: the whole output and all the work, decided from headers alone.

Everything that changes a byte of the result is decided here and covered by the fingerprint;
lanes, sizes of reads and the number of workers are not, and change nothing.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from merge_core.decoding import Decoding
from merge_core.decoding.stored import Stored
from merge_core.layout import DTYPE_BYTES, FileLayout, TensorSpec, lay_out
from merge_core.stores.location import Location
from merge_core.stores.store import FileIdentity
from merge_core.updates import SingleUpdate, Update
from merge_core.updates.combined import Combination
from merge_core.updates.tuning import Tuning


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where a tensor's values come from, before any update."""

    tensor: TensorSpec
    """As it is stored; of one that is decoded, what comes out, which lies in no file."""
    file: int | None
    """Index into ``MergePlan.base_files``; None: one of the two below."""
    adapter: int | None = None
    """Index into ``MergePlan.adapters`` of the one that brings the whole tensor."""
    within: TensorSpec | None = None
    """The adapter's tensor, where ``tensor`` is a part of it: its bytes lie together in there."""
    decoding: Decoding | None = None
    """How it comes out of other tensors of the base."""

    @property
    def dtype_bytes(self) -> int:
        """Bytes an element."""
        return DTYPE_BYTES[self.tensor.dtype]

    @property
    def stored(self) -> Sequence[Stored]:
        """What is read of the base for it; nothing where an adapter brings it."""
        if self.decoding is not None:
            return self.decoding.stored
        return [] if self.file is None else [Stored(file=self.file, tensor=self.tensor)]

    @property
    def base_files(self) -> set[int]:
        """The files of the base that it is read from."""
        return {stored.file for stored in self.stored}

    @property
    def bytes_read(self) -> int:
        """Bytes that are read for it."""
        if self.adapter is not None:
            return self.tensor.nbytes
        return sum(stored.tensor.nbytes for stored in self.stored)


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorTask:
    """How one output tensor comes about."""

    target: TensorSpec
    source: Source
    updates: tuple[Update, ...]

    @property
    def action(self) -> str:
        """``merged``, ``replaced`` by the adapter's, ``decoded`` from packed tensors, ``converted``
        to another dtype, or ``copied`` as bytes.
        """
        if self.updates:
            return "merged"
        if self.source.adapter is not None:
            return "replaced"
        if self.source.decoding is not None:
            return "decoded"
        return "copied" if self.as_bytes else "converted"

    @property
    def as_bytes(self) -> bool:
        """Whether it is carried over byte for byte. What is decoded may be NaN, so it is not."""
        decoded = self.source.decoding is not None
        return not (self.updates or decoded) and self.source.tensor.dtype == self.target.dtype

    @property
    def parts(self) -> Iterator[SingleUpdate]:
        """The updates, what several adapters do together taken apart."""
        for update in self.updates:
            yield from update.parts if update.kind == "combined" else (update,)

    def read_of(self, adapter: int) -> Iterator[TensorSpec]:
        """The tensors of one adapter that it reads; some may come twice."""
        if self.source.adapter == adapter:
            yield self.source.within or self.source.tensor
        for update in self.parts:
            if update.adapter == adapter:
                yield from update.tensors

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
class StoredHead:
    """A head that a base with tied embeddings stores as well: it is left out, as loaders do, and
    must hold the bytes of the embeddings.
    """

    head: Source
    embeddings: Source


@dataclass(frozen=True, slots=True, kw_only=True)
class SideFile:
    """A file beside the weights that is carried over byte for byte."""

    name: str
    """In the result."""
    folder: Location
    """Where it lies: the base, or what brings the tokenizer."""
    file: FileIdentity
    """There."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterInput:
    """An adapter as the workers need it."""

    path: Location
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

    base: Location
    base_files: tuple[FileIdentity, ...]
    header_digests: tuple[str, ...]
    config: Mapping[str, Any]
    """The base's config.json."""
    config_changes: Mapping[str, Any]
    """Fields of config.json that the merge changes, None: removes; empty means: copied byte for
    byte."""
    stored_head: StoredHead | None
    """``stored_head.check_stored_head`` proves it."""
    side_files: tuple[SideFile, ...]
    adapters: tuple[AdapterInput, ...]
    twins: tuple[Twins, ...]
    keep_tied: bool
    """Whether tied embeddings and head were to stay one tensor, whatever was trained of either."""
    combination: Combination
    """How the factors of several adapters become one."""
    added: tuple[str, ...]
    """Tensors that the base does not have, or not by itself: a head that is untied, the layers that
    ``layer_replication`` adds."""
    shards: tuple[Shard, ...]
    stage: frozenset[int]
    """Those that are to be made now; it changes no byte of any."""
    card: str
    """README.md of the result. Not in the fingerprint, as names of directories stand in it."""
    recipe: Mapping[str, Any]
    """What it is made from, as ``recipe_text`` writes it and ``raymeld merge`` reads it again."""
    notes: tuple[str, ...]

    @property
    def tasks(self) -> Iterator[TensorTask]:
        """Every tensor of the output, shard after shard."""
        return (task for shard in self.shards for task in shard.tasks)

    @property
    def pinned(self) -> set[str]:
        """The devices that some shards of this stage ask for."""
        devices = {self.shards[index].device for index in self.stage}
        return {device for device in devices if device is not None}

    @property
    def simulates_nf4(self) -> bool:
        """Whether the base is rounded as QLoRA does it."""
        return any(
            task.source.decoding is not None and task.source.decoding.kind == "nf4"
            for task in self.tasks
        )

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
            "side_files": [[f.name, f.file.size] for f in self.side_files],
            "adapters": [[a.weight, dict(a.digests)] for a in self.adapters],
            "tunings": [a.tuning.arithmetic if a.tuning else None for a in self.adapters],
            "shards": [asdict(shard) for shard in self.shards],
        }
        text = json.dumps(covered, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

"""LoRA factors: read and checked as a whole once, then fetched tensor by tensor by the workers."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any

import numpy as np

from merge_core.adapter import load_pickle
from merge_core.digest import CELL_BYTES, bytes_digest, cell_digest, tensor_digest
from merge_core.errors import InputError, Problem, replaced
from merge_core.layout import DTYPE_BYTES, TensorSpec
from merge_core.plan import AdapterInput, MergePlan
from merge_core.read_ahead import ReadAhead, Room
from merge_core.read_blocks import Range
from merge_core.stores.location import Location
from merge_core.stores.opening import check_unchanged, fetch, open_store
from merge_core.stores.store import Reader

if TYPE_CHECKING:
    import torch

_EXPONENTS = {
    "F32": (np.uint32, 0x7F80_0000),
    "BF16": (np.uint16, 0x7F80),
    "F16": (np.uint16, 0x7C00),
}
"""Integer view and exponent mask of each dtype: all exponent bits set means NaN or infinity.
numpy has no bfloat16, and torch is still being imported when the factors are checked."""

_FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_INTEGERS = {"U8": "uint8", "I8": "int8", "I16": "int16", "I32": "int32", "I64": "int64"}
"""What torch calls each dtype. Some tuners save places beside values."""

_COMPARED = 4 << 20
"""Elements of twins that are compared at a time: 16 MB each, where a whole one may have 5 GB."""

MOST_BLOCKS = 3
"""Of an adapter that are held: it has some megabytes a layer, where the base has hundreds."""


def seal(plan: MergePlan) -> MergePlan:
    """Read every factor once: returns the plan with their digests, which fixes its fingerprint.

    Raises:
        InputError: with every factor that holds a NaN or an infinity.
        StorageError: an adapter changed since it was planned with.
    """
    problems: list[Problem] = []
    adapters = []
    with contextlib.ExitStack() as opened:
        sources = [opened.enter_context(closing(FactorSource(one))) for one in plan.adapters]
        for index, (adapter, source) in enumerate(zip(plan.adapters, sources, strict=True)):
            digests = {}
            used = _used_of(plan, index)
            with source.fetched_ahead(used):
                for tensor in used:
                    digests[tensor.name], bad = _examine(source, tensor)
                    if bad is not None:
                        problems.append(bad_factor(tensor, bad, adapter.path))
            adapters.append(dataclasses.replace(adapter, digests=digests))
        problems += _unequal(plan, sources)
    if problems:
        raise InputError(problems)
    return dataclasses.replace(plan, adapters=tuple(adapters))


def bad_factor(factor: TensorSpec, row: int, path: Location) -> Problem:
    """The problem of a factor that holds a NaN or an infinity in ``row``."""
    return Problem(
        f"holds NaN or infinity in row {row}",
        f"{path}, tensor {factor.name!r}",
        "Use a checkpoint from before the training diverged",
    )


class FactorSource:
    """The tensors of one adapter file. Threads may share it."""

    def __init__(self, adapter: AdapterInput) -> None:
        self._adapter = adapter
        self._path = adapter.path / adapter.file.name
        fetch(adapter.path, adapter.file)
        self._reader: Reader | None = None
        self._state: dict[str, Any] = {}
        if adapter.file.name.endswith(".safetensors"):
            self._reader = open_store(adapter.path).open(adapter.file)
        else:
            check_unchanged(adapter.path, adapter.file)
            self._state = load_pickle(self._path)

    def raw(self, factor: TensorSpec) -> memoryview:
        """The factor's bytes."""
        return self.part(factor, 0, factor.nbytes)

    def part(self, tensor: TensorSpec, first: int, behind: int) -> memoryview:
        """Bytes ``first`` ... ``behind`` of a tensor, or to its end."""
        behind = min(behind, tensor.nbytes)
        if self._reader is None:
            return memoryview(_as_bytes(self._state[tensor.name]))[first:behind]
        return self._reader.read(tensor.offset + first, behind - first)

    @contextlib.contextmanager
    def fetched_ahead(self, tensors: Iterable[TensorSpec]) -> Iterator[None]:
        """Have ``tensors`` fetched before they are asked for, while inside, if it lies in a store.

        Their order is that in which they will be asked for.
        """
        reader = self._reader
        if reader is None or self._adapter.path.is_local:
            yield
            return
        ranges = [Range(0, one.offset, one.offset + one.nbytes) for one in tensors]
        with closing(ReadAhead([reader], ranges, Room(MOST_BLOCKS))) as ahead:
            self._reader = ahead.reader(0)
            try:
                yield
            finally:
                self._reader = reader

    def load(self, factor: TensorSpec, device: torch.device) -> torch.Tensor:
        """The factor on ``device``, proven to be the one that was sealed: in float32, or integers
        as they are.

        Raises:
            StorageError: its bytes differ from those that the plan was sealed with.
        """
        import torch

        raw = self.raw(factor)
        if bytes_digest(raw) != self._adapter.digests[factor.name]:
            raise replaced(self._path)
        stored = {**_FLOATS, **_INTEGERS}[factor.dtype]
        flat = torch.frombuffer(raw, dtype=getattr(torch, stored))
        whole = flat.reshape(factor.shape).to(device)
        return whole if factor.dtype in _INTEGERS else whole.float()

    def close(self) -> None:
        """Close the file."""
        if self._reader is not None:
            self._reader.close()


def _used_of(plan: MergePlan, adapter: int) -> list[TensorSpec]:
    """Every tensor of an adapter that some task reads, once, as they lie in its file."""
    used: dict[str, TensorSpec] = {}
    for task in plan.tasks:
        used |= {tensor.name: tensor for tensor in task.read_of(adapter)}
    tuning = plan.adapters[adapter].tuning
    if tuning is not None:
        used |= {tensor.name: tensor for tensor in tuning.shared}
    for twins in plan.twins:
        used |= {t.name: t for number, t in (twins.one, twins.other) if number == adapter}
    return sorted(used.values(), key=lambda tensor: tensor.offset)


def _examine(source: FactorSource, tensor: TensorSpec) -> tuple[str, int | None]:
    """Digest of a tensor, and its first row with a NaN or an infinity; a cell at a time."""
    integers, mask = _EXPONENTS.get(tensor.dtype, (np.uint8, None))
    cells, bad = [], None
    for first in range(0, tensor.nbytes, CELL_BYTES):
        raw = source.part(tensor, first, min(first + CELL_BYTES, tensor.nbytes))
        cells.append(cell_digest(raw))
        if mask is None:  # integers are all finite
            continue
        found = np.flatnonzero((np.frombuffer(raw, dtype=integers) & mask) == mask)
        if found.size and bad is None:
            element = first // DTYPE_BYTES[tensor.dtype] + int(found[0])
            bad = element // max(1, math.prod(tensor.shape[1:]))
    return tensor_digest(cells), bad


def _unequal(plan: MergePlan, sources: Sequence[FactorSource]) -> Iterator[Problem]:
    """Tensors that must hold the same values, and do not."""
    for twins in plan.twins:
        (one, mine), (two, its) = twins.one, twins.other
        if not _same_values(sources[one], mine, sources[two], its, transposed=twins.transposed):
            whose = "" if one == two else f" in {plan.adapters[one].path}"
            yield Problem(
                f"{its.name!r} should hold the values of {mine.name!r}{whose}, and does not",
                str(plan.adapters[two].path),
                "Merge adapters that agree on it, or without tied weights",
            )


def _same_values(
    one: FactorSource, mine: TensorSpec, two: FactorSource, its: TensorSpec, *, transposed: bool
) -> bool:
    if mine.shape != (its.shape[::-1] if transposed else its.shape):
        return False
    if transposed:  # factors, of some megabytes
        a = as_float32(one.raw(mine), mine).reshape(mine.shape)
        return np.array_equal(a, as_float32(two.raw(its), its).reshape(its.shape).T)
    for first in range(0, math.prod(mine.shape), _COMPARED):
        a, b = (
            as_float32(source.part(tensor, first * size, (first + _COMPARED) * size), tensor)
            for source, tensor, size in (
                (one, mine, DTYPE_BYTES[mine.dtype]),
                (two, its, DTYPE_BYTES[its.dtype]),
            )
        )
        if not np.array_equal(a, b):
            return False
    return True


def as_float32(raw: memoryview, tensor: TensorSpec) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Elements of ``tensor`` in float32, exactly; numpy knows no bfloat16."""
    if tensor.dtype == "BF16":
        return (np.frombuffer(raw, dtype="<u2").astype("<u4") << 16).view("<f4")
    return np.frombuffer(raw, dtype="<f2" if tensor.dtype == "F16" else "<f4").astype("<f4")


def _as_bytes(tensor: torch.Tensor) -> Any:
    import torch

    # Views that negate or that step over elements are pickled as such; numpy wants plain bytes.
    return tensor.resolve_neg().reshape(-1).contiguous().view(torch.uint8).numpy()

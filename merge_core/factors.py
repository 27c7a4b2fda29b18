"""LoRA factors: read and checked as a whole once, then fetched tensor by tensor by the workers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from merge_core.adapter import load_pickle
from merge_core.digest import bytes_digest
from merge_core.errors import InputError, Problem
from merge_core.layout import DTYPE_BYTES, TensorSpec
from merge_core.plan import AdapterInput, MergePlan
from merge_core.storage import RangeReader, replaced

if TYPE_CHECKING:
    import torch

_EXPONENTS = {
    "F32": (np.uint32, 0x7F80_0000),
    "BF16": (np.uint16, 0x7F80),
    "F16": (np.uint16, 0x7C00),
}
"""Integer view and exponent mask of each dtype: all exponent bits set means NaN or infinity.
numpy has no bfloat16, and torch is still being imported when the factors are checked."""


_COMPARED_ELEMENTS = 4 << 20
"""Of a saved copy and the base at a time: 16 MB of float32 each."""


def seal(plan: MergePlan) -> MergePlan:
    """Read every factor once: returns the plan with their digests, which fixes its fingerprint.

    Raises:
        InputError: with every factor that holds a NaN or an infinity.
        StorageError: an adapter changed since it was planned with.
    """
    problems: list[Problem] = []
    adapters = []
    for index, adapter in enumerate(plan.adapters):
        source = FactorSource(adapter)
        digests = {}
        for factor in _factors_of(plan, index):
            raw = source.raw(factor)
            digests[factor.name] = bytes_digest(raw)
            bad = _first_non_finite(raw, factor)
            if bad is not None:
                problems.append(bad_factor(factor, bad, adapter.path))
        problems += _changed_copies(plan, adapter, source)
        source.close()
        adapters.append(dataclasses.replace(adapter, factor_digests=digests))
    if problems:
        raise InputError(problems)
    return dataclasses.replace(plan, adapters=tuple(adapters))


def bad_factor(factor: TensorSpec, row: int, path: Path) -> Problem:
    """The problem of a factor that holds a NaN or an infinity in ``row``."""
    return Problem(
        f"holds NaN or infinity in row {row}",
        f"{path}, tensor {factor.name!r}",
        "Use a checkpoint from before the training diverged",
    )


class FactorSource:
    """The tensors of one adapter file. Threads may share it."""

    def __init__(self, adapter: AdapterInput) -> None:
        adapter.file.check(adapter.path)
        self._adapter = adapter
        self._path = adapter.path / adapter.file.name
        self._reader: RangeReader | None = None
        self._state: dict[str, Any] = {}
        if adapter.file.name.endswith(".safetensors"):
            self._reader = RangeReader(self._path)
        else:
            self._state = load_pickle(self._path)

    def raw(self, factor: TensorSpec) -> memoryview:
        """The factor's bytes."""
        return self.part(factor, 0, factor.nbytes)

    def part(self, tensor: TensorSpec, first: int, behind: int) -> memoryview:
        """Bytes ``first`` ... ``behind`` of a tensor."""
        if self._reader is None:
            return memoryview(_as_bytes(self._state[tensor.name]))[first:behind]
        return self._reader.read_cached(tensor.offset + first, behind - first)

    def load(self, factor: TensorSpec, device: torch.device) -> torch.Tensor:
        """The factor in float32 on ``device``, proven to be the one that was sealed.

        Raises:
            StorageError: its bytes differ from those that the plan was sealed with.
        """
        import torch

        raw = self.raw(factor)
        if bytes_digest(raw) != self._adapter.factor_digests[factor.name]:
            raise replaced(self._path)
        stored = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[factor.dtype]
        flat = torch.frombuffer(raw, dtype=stored)
        return flat.reshape(factor.shape).to(device=device, dtype=torch.float32)

    def close(self) -> None:
        """Close the file."""
        if self._reader is not None:
            self._reader.close()


def _factors_of(plan: MergePlan, adapter: int) -> Iterator[TensorSpec]:
    for task in plan.tasks:
        for update in task.updates:
            if update.adapter == adapter:
                yield update.a
                yield update.b


def _first_non_finite(raw: memoryview, factor: TensorSpec) -> int | None:
    integers, mask = _EXPONENTS[factor.dtype]
    rows = np.frombuffer(raw, dtype=integers).reshape(factor.shape)
    bad = np.flatnonzero(((rows & mask) == mask).any(axis=1))
    return int(bad[0]) if bad.size else None


def _changed_copies(plan: MergePlan, adapter: AdapterInput, source: FactorSource) -> list[Problem]:
    """The base tensors that the adapter carries along must be the base's own, value by value."""
    problems = []
    for saved in adapter.copies:
        reader = RangeReader(plan.base / plan.base_files[saved.source_file].name)
        elements = saved.copy.nbytes // DTYPE_BYTES[saved.copy.dtype]
        for first in range(0, elements, _COMPARED_ELEMENTS):
            behind = min(first + _COMPARED_ELEMENTS, elements)
            item = DTYPE_BYTES[saved.copy.dtype]
            mine = as_float32(source.part(saved.copy, first * item, behind * item), saved.copy)
            item = DTYPE_BYTES[saved.source.dtype]
            raw = reader.read_cached(saved.source.offset + first * item, (behind - first) * item)
            if not np.array_equal(mine, as_float32(raw, saved.source), equal_nan=True):
                problems.append(
                    Problem(
                        f"carries its own copy of {saved.source.name!r}, which differs from the"
                        " base's: trained or resized weights are not merged yet",
                        f"{adapter.path}, tensor {saved.copy.name!r}",
                        "Give the base that it was trained on, or merge it with PEFT",
                    )
                )
                break
        reader.close()
    return problems


def as_float32(raw: memoryview, tensor: TensorSpec) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Elements of ``tensor`` in float32, exactly; numpy knows no bfloat16."""
    if tensor.dtype == "BF16":
        return (np.frombuffer(raw, dtype="<u2").astype("<u4") << 16).view("<f4")
    return np.frombuffer(raw, dtype="<f2" if tensor.dtype == "F16" else "<f4").astype("<f4")


def _as_bytes(tensor: torch.Tensor) -> Any:
    import torch

    # Views that negate or that step over elements are pickled as such; numpy wants plain bytes.
    return tensor.resolve_neg().reshape(-1).contiguous().view(torch.uint8).numpy()

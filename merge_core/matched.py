"""The tensors of the result: what each starts from and what is done to it, by name."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from merge_core.errors import refuse
from merge_core.plan import Source, Twins
from merge_core.updates import LowRankUpdate, SingleUpdate, StackedUpdate
from merge_core.updates.tuning import Tuning


@dataclass(slots=True)
class Matched:
    """The tensors of the result by name, before they are cut into shards."""

    sources: dict[str, Source]
    dtypes: dict[str, str]
    """Of the base's tensors, whatever an adapter brings in their place."""
    updates: dict[str, list[SingleUpdate]] = field(default_factory=dict)
    """In the order of the adapters."""
    twins: list[Twins] = field(default_factory=list)
    """Tensors of adapters that must be the same."""
    config_changes: dict[str, Any] = field(default_factory=dict)
    """Fields of config.json that the adapters change."""
    notes: list[str] = field(default_factory=list)
    tunings: dict[int, Tuning] = field(default_factory=dict)
    """By the number of the adapter: what PEFT is to merge."""

    @classmethod
    def of(cls, bases: Mapping[str, Source], decoded: str | None) -> Matched:
        """The base as it is; what is decoded gets its own dtype, or the one that is given."""
        dtypes = {
            name: decoded if decoded and source.decoding is not None else source.tensor.dtype
            for name, source in bases.items()
        }
        return cls(sources=dict(bases), dtypes=dtypes)

    def add(self, name: str, update: SingleUpdate) -> None:
        """Have a tensor updated."""
        self._check(name)
        self.updates.setdefault(name, []).append(update)

    def _check(self, name: str) -> None:
        if name not in self.sources:
            raise AssertionError(f"nothing is written as {name!r}, so its update would be lost")

    def add_to_rows(self, name: str, first: int, update: LowRankUpdate, at: str) -> None:
        """Have the rows of a tensor updated that begin with ``first``.

        Args:
            at: what the update comes from.

        Raises:
            InputError: the same adapter has something else for some of these rows.
        """
        self._check(name)
        parts, there = [(first, update)], self.updates.setdefault(name, [])
        last = there[-1] if there else None
        if isinstance(last, StackedUpdate) and last.adapter == update.adapter:
            parts += last.parts
            there.pop()
        parts.sort(key=lambda part: part[0])
        there.append(StackedUpdate(parts=tuple(parts)))
        for (top, one), (second, other) in itertools.pairwise(parts):
            if second < top + one.rows:
                names = f"{one.a.tensor.name!r} and {other.a.tensor.name!r}"
                what = f"{names} are factors of the same rows of {name!r}"
                raise refuse(what, at, "Keep those of the expert, or those of all experts")

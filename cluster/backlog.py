"""The backlog: items of work, and those of them that wait, in the order in which they go out."""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

OVERHEAD_BYTES = 16_000_000
"""What an item costs beside its bytes: opening files, loading factors, an fsync. Without it the
smallest shard of a checkpoint, a norm of some kilobytes, would look slow beyond measure."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One thing to do, once."""

    size: int
    """Bytes that pass through a worker."""
    rank: int = 0
    """Lower ones go out first, and only items of one rank tell how long another of it takes."""
    device: str | None = None
    """The kind of worker that alone may do it; None: any."""
    read_ahead: bool = False
    """Whether a worker that is told of it reads its beginning early: it comes from a store."""

    @property
    def cost(self) -> int:
        """What its duration is in proportion to, in bytes."""
        return self.size + OVERHEAD_BYTES


@dataclass(slots=True)
class Backlog:
    """Waiting items by their number: of the lowest rank the largest first, and behind all others of
    its rank what is reserved for somebody.
    """

    _lines: dict[str | None, list[tuple[int, bool, int, int]]] = field(default_factory=dict)
    _items: dict[int, Item] = field(default_factory=dict)
    _reserved: set[int] = field(default_factory=set)
    _costs: Counter[tuple[str | None, int]] = field(default_factory=Counter)

    def __len__(self) -> int:
        return len(self._items)

    def __contains__(self, number: int) -> bool:
        return number in self._items

    @property
    def devices(self) -> list[str | None]:
        """The kinds of worker that waiting items ask for."""
        return [device for device, line in self._lines.items() if line]

    def add(self, number: int, item: Item) -> None:
        """Have an item wait."""
        self._items[number] = item
        self._costs[item.device, item.rank] += item.cost
        insort(self._lines.setdefault(item.device, []), self._key(number))

    def remove(self, number: int) -> None:
        """Have it wait no more."""
        self._take_out(number)
        self._reserved.discard(number)
        item = self._items.pop(number)
        self._costs[item.device, item.rank] -= item.cost

    def reserve(self, number: int, *, reserved: bool = True) -> None:
        """Have somebody in particular do a waiting item, unless all others are out of work; or
        have it wait for anybody again.
        """
        self._take_out(number)
        (self._reserved.add if reserved else self._reserved.discard)(number)
        insort(self._lines[self._items[number].device], self._key(number))

    def is_reserved(self, number: int) -> bool:
        """Whether a waiting item is reserved."""
        return number in self._reserved

    def waiting(self, device: str) -> Iterator[int]:
        """The items that a worker of this kind may do, in order."""
        lines = (self._lines.get(one, []) for one in (None, device))
        return (number for *_, number in heapq.merge(*lines))

    def count(self, device: str) -> int:
        """How many those are."""
        return sum(len(self._lines.get(one, [])) for one in (None, device))

    def cost(self, device: str, rank: int) -> int:
        """What those of one rank cost together, in bytes."""
        return sum(self._costs[one, rank] for one in (None, device))

    def _take_out(self, number: int) -> None:
        line = self._lines[self._items[number].device]
        del line[bisect_left(line, self._key(number))]

    def _key(self, number: int) -> tuple[int, bool, int, int]:
        item = self._items[number]
        return item.rank, number in self._reserved, -item.size, number

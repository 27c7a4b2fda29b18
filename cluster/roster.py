"""The roster: all workers and all items, and who does which item next."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field

from cluster import policies
from cluster.attempts import Attempts, Place
from cluster.backlog import Backlog, Item
from cluster.commands import Assign, Command, Release, Start
from cluster.crew import Crew, Run


@dataclass(slots=True)
class Roster:
    """Who is there, what is to be done, and what waits."""

    crews: list[Crew]
    crew_of: dict[int, Crew] = field(default_factory=dict)
    """By worker."""
    nodes: dict[int, str] = field(default_factory=dict)
    """Of every worker that came up."""
    items: dict[int, Item] = field(default_factory=dict)
    attempts: dict[int, Attempts] = field(default_factory=dict)
    backlog: Backlog = field(default_factory=Backlog)
    _next: dict[int, int] = field(default_factory=dict)
    """The item that is reserved for a worker."""
    _numbers: itertools.count[int] = field(default_factory=itertools.count)

    def strike_off(self, worker: int) -> Run | None:
        """Forget a worker; what it was at, if anything."""
        self.unreserve(worker)
        run = self.crew_of.pop(worker).forget(worker)
        if run is not None:
            self.attempts[run.item].workers.discard(worker)
        return run

    def wait_again(self, number: int) -> None:
        """Have an item wait, unless somebody else is at it, or will be."""
        if number not in self.backlog and not self.attempts[number].workers:
            self.backlog.add(number, self.items[number])

    def assignments(self, now: float) -> list[Command]:
        """Give every idle worker the item that it should do next."""
        commands: list[Command] = []
        for crew in self.crews:
            for worker in sorted(crew.idle) if self.backlog else ():
                number = self._pick(crew, worker)
                if number is None:
                    continue
                self.backlog.remove(number)
                crew.idle.discard(worker)
                crew.running[worker] = Run(item=number, since=now)
                of = self.attempts[number]
                of.begin(worker)
                then = self._reserve(crew, worker, self.items[number])
                commands.append(
                    Assign(
                        worker=worker, item=number, attempt=of.begun, shrink=of.shrink, then=then
                    )
                )
        return commands

    def _reserve(self, crew: Crew, worker: int, item: Item) -> int | None:
        """What a worker that got ``item`` does after it, if nobody is in more need of that.

        The first ones are for workers that come up. Nothing that failed before: who tries that next
        depends on who is up then.
        """
        if not item.read_ahead:
            return None
        others = len(crew.starting) + len(crew.idle)
        waiting = self.backlog.waiting(crew.kind.name)
        number = next(itertools.islice(waiting, others, None), None)
        if number is None or self.backlog.is_reserved(number):
            return None
        if not self.items[number].read_ahead or self.items[number].rank != item.rank:
            return None
        if self.attempts[number].tried or not self._is_for(crew, number):
            return None
        self.backlog.reserve(number)
        self._next[worker] = number
        return number

    def unreserve(self, worker: int) -> int | None:
        """Have what is reserved for a worker wait for anybody; what that is."""
        number = self._next.pop(worker, None)
        if number is None or not self.backlog.is_reserved(number):
            return None
        self.backlog.reserve(number, reserved=False)
        return number

    def _pick(self, crew: Crew, worker: int) -> int | None:
        """What is reserved for a worker, or the first waiting item that did not just fail here,
        unless there is nobody else, and that faster workers do not do better.
        """
        mine = self.unreserve(worker)
        suitable = (
            number
            for number in self.backlog.waiting(crew.kind.name)
            if self._is_for(crew, number) and self._suits(worker, number)
        )
        first = next(suitable, None)
        if first is None or mine is None or not self._is_for(crew, mine):
            return first
        return min(
            mine, first, key=lambda number: (self.items[number].rank, -self.items[number].size)
        )

    def _suits(self, worker: int, number: int) -> bool:
        """Whether nobody else that is up should rather try the item next."""
        attempts = self.attempts[number]
        if not attempts.tried:
            return True
        able = (crew for crew in self.able(self.items[number].device) if self._is_for(crew, number))
        up = {one for crew in able for one in (*crew.idle, *crew.running)}
        return attempts.suits(self.place_of(worker), [self.place_of(one) for one in up - {worker}])

    def place_of(self, worker: int) -> Place:
        """A worker that is up, and its node."""
        return Place(worker, self.nodes[worker])

    def _is_for(self, crew: Crew, number: int) -> bool:
        item = self.items[number]
        others = [other for other in self.able(item.device) if other is not crew]
        if not others:
            return True
        waiting = self.backlog.cost(others[0].kind.name, item.rank)
        return not policies.leave_to_faster(item.cost, item.rank, crew, others, waiting).yes

    def able(self, device: str | None) -> list[Crew]:
        """The crews that may do an item of this device."""
        return [crew for crew in self.crews if device in (None, crew.kind.name)]

    def starts(self) -> Iterable[Command]:
        """Workers for the items that none is there for."""
        for crew in self.crews:
            waiting = self.backlog.count(crew.kind.name) if crew.room > 0 else 0
            spare = len(crew.starting) + len(crew.idle)
            wanted = min(crew.room + spare, waiting)
            if wanted <= spare:  # nearly always: islice would look at all that they are there for
                continue
            suitable = (n for n in self.backlog.waiting(crew.kind.name) if self._is_for(crew, n))
            for _ in itertools.islice(suitable, spare, wanted):
                worker = next(self._numbers)
                crew.starting.add(worker)
                crew.latest = worker
                self.crew_of[worker] = crew
                delay = 2.0**crew.failed_starts - 1
                yield Start(worker=worker, kind=crew.kind.name, delay=delay)

    def releases(self) -> Iterable[Command]:
        """Workers for whom nothing is left; the youngest of those that come are the least likely
        to be up.
        """
        for crew in self.crews:
            surplus = len(crew.starting) - self.backlog.count(crew.kind.name)
            gone = sorted(crew.starting)[-surplus:] if surplus > 0 else []
            if not any(self._is_for(crew, n) for n in self.backlog.waiting(crew.kind.name)):
                gone += sorted(crew.idle)  # or they wait until somebody else has tried it
            if not self.backlog:
                gone += sorted(crew.left)
            for worker in gone:
                self.strike_off(worker)
                yield Release(worker=worker)

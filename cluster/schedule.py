"""Who does what next: a state machine of events in and commands out.

No Ray and no clock in here, so that every order of failures can be tried in a test. The most urgent
and largest waiting item goes to the first worker that is free; ``policies`` holds what is decided
on the way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from actors.events import (
    Event,
    ItemDone,
    ItemFailed,
    KindUnavailable,
    WorkerDraining,
    WorkerLost,
    WorkerReady,
    WorkerStartFailed,
    WorkerUnfit,
)
from cluster import policies
from cluster.attempts import Attempts
from cluster.backlog import Item
from cluster.commands import Abort, Command, Release
from cluster.crew import Crew, WorkerKind
from cluster.roster import Roster


class Schedule:
    """The state of a run; ``handle`` is the only way to change it.

    Args:
        kinds: of worker, each with how many there may be.
        name_of: what an item is called in the log.
    """

    def __init__(
        self, kinds: Sequence[WorkerKind], name_of: Callable[[int], str] = "item {}".format
    ) -> None:
        self.log: list[str] = []
        """Every automatic decision, with its reason."""
        self.holds = False
        """Whether idle workers are kept because more items will come; they are let go otherwise,
        so that an autoscaler can take their nodes while the last items are under way."""
        self._name_of = name_of
        self._roster = Roster([Crew(kind) for kind in kinds])
        self._aborted = False

    def extend(self, items: Mapping[int, Item]) -> None:
        """Add items; their numbers must be new."""
        for number, item in items.items():
            self._roster.items[number], self._roster.attempts[number] = item, Attempts()
            self._roster.backlog.add(number, item)

    @property
    def finished(self) -> bool:
        """Whether every item is done."""
        return not self._roster.backlog and not any(crew.running for crew in self._roster.crews)

    def awaits(self, worker: int, item: int) -> bool:
        """Whether the worker is still meant to be at the item: what it returns counts."""
        crew = self._roster.crew_of.get(worker)
        return crew is not None and worker in crew.running and crew.running[worker].item == item

    def at_work(self, worker: int) -> str | None:
        """The kind of a worker that is meant to be at an item; None of any other."""
        crew = self._roster.crew_of.get(worker)
        return crew.kind.name if crew is not None and worker in crew.running else None

    def look(self, now: float) -> list[Command]:
        """What to do after items were added, or as time passes.

        Args:
            now: seconds, by any clock that only runs forward.
        """
        if self._aborted:
            return []
        self._find_stragglers(now)
        return self._go_on(now)

    def handle(self, event: Event, now: float) -> list[Command]:
        """Take note of ``event`` and say what to do now."""
        if self._aborted:
            return []
        commands = self._note(event, now)
        self._aborted = any(isinstance(command, Abort) for command in commands)
        return commands if self._aborted else commands + self._go_on(now)

    def _go_on(self, now: float) -> list[Command]:
        stuck = self._stuck()
        self._aborted = bool(stuck)
        if stuck:
            return stuck
        commands = self._roster.assignments(now)
        if not self.holds:
            commands += self._roster.releases()
        return [*commands, *self._roster.starts()]

    def _note(self, event: Event, now: float) -> list[Command]:  # noqa: PLR0911 - one an event
        if isinstance(event, KindUnavailable):
            return self._unavailable(event)
        crew = self._roster.crew_of.get(event.worker)
        if crew is None:
            return []  # about a worker that was let go: it came too late
        match event:
            case WorkerReady(worker=worker, node=node) if worker in crew.starting:
                crew.starting.discard(worker)
                crew.idle.add(worker)
                crew.failed_starts = 0
                self._roster.nodes[worker] = node
            case WorkerStartFailed(worker=worker) if worker in crew.starting:
                self._roster.strike_off(worker)
                self._start_failed(crew, worker, event.reason, event.cause)
            case WorkerUnfit(worker=worker, reason=reason) if worker in crew.starting:
                self._leave_alone(crew, worker, reason)
            case WorkerLost():
                return self._lost(crew, event)
            case WorkerDraining():
                return self._drains(crew, event)
            case ItemDone(worker=worker, item=item) if self.awaits(worker, item):
                return self._done(crew, worker, item, now)
            case ItemFailed(worker=worker, item=item) if self.awaits(worker, item):
                return [*self._free(crew, worker), *self._failed(event)]
            case _:
                pass  # about an attempt that was given up
        return []

    def _done(self, crew: Crew, worker: int, number: int, now: float) -> list[Command]:
        item, seconds = self._roster.items[number], now - crew.running[worker].since
        crew.timed(item.rank, item.cost, seconds)
        commands = self._free(crew, worker)
        if number in self._roster.backlog:
            self._roster.backlog.remove(number)
        for other in sorted(self._roster.attempts[number].workers):
            name = self._name_of(number)
            self.log.append(f"worker-{other} is let go: worker-{worker} was first with {name}")
            self._roster.strike_off(other)
            commands.append(Release(worker=other))
        return commands

    def _free(self, crew: Crew, worker: int) -> list[Command]:
        run = crew.running.pop(worker)
        crew.late.discard(worker)
        self._roster.attempts[run.item].workers.discard(worker)
        if worker in crew.draining:  # its node waits for nothing else
            self._roster.strike_off(worker)
            return [Release(worker=worker)]
        crew.idle.add(worker)
        return []

    def _drains(self, crew: Crew, event: WorkerDraining) -> list[Command]:
        """Let it finish what it can in the time that is left, and nothing more."""
        worker, decision = event.worker, policies.hand_back(event.seconds_left)
        run = crew.running.get(worker)
        if run is None:
            self._roster.strike_off(worker)
            self.log.append(f"worker-{worker} is let go: {decision.reason}")
            return [Release(worker=worker)]
        name = self._name_of(run.item)
        if decision.yes:
            self._roster.strike_off(worker)
            self._roster.wait_again(run.item)
            self.log.append(f"worker-{worker} gives back {name}: {decision.reason}")
            return [Release(worker=worker)]
        if worker not in crew.draining:
            crew.draining.add(worker)
            self._roster.unreserve(worker)
            self.log.append(f"worker-{worker} gets nothing after {name}: {decision.reason}")
        return []

    def _start_failed(
        self, crew: Crew, worker: int, reason: str, cause: Exception | None = None
    ) -> None:
        if not crew.start_failed(worker):
            return
        decision = policies.start_again(crew.failed_starts, reason)
        if decision.yes:
            self.log.append(f"starting another worker; {decision.reason}")
        elif crew.closed is None:
            crew.close(decision.reason, cause)
            self.log.append(f"no more {crew.kind.name} workers are started: {decision.reason}")

    def _leave_alone(self, crew: Crew, worker: int, reason: str) -> None:
        crew.starting.discard(worker)
        crew.left.add(worker)
        self.log.append(f"worker-{worker} is left alone: {reason}")
        if len(crew.left) >= crew.kind.ceiling:
            crew.close(f"no {crew.kind.name} worker is of use, the last one: {reason}")

    def _unavailable(self, event: KindUnavailable) -> list[Command]:
        crew = next(crew for crew in self._roster.crews if crew.kind.name == event.kind)
        crew.close(str(event.error), event.error)
        gone = sorted(crew.starting | crew.left)
        for worker in gone:
            self._roster.strike_off(worker)
        if not all(other.hopeless for other in self._roster.crews):
            self.log.append(f"going on without {event.kind} workers: {event.reason}")
        return [Release(worker=worker) for worker in gone]

    def _lost(self, crew: Crew, event: WorkerLost) -> list[Command]:
        starting, draining = event.worker in crew.starting, event.worker in crew.draining
        run = self._roster.strike_off(event.worker)
        if starting:
            self._start_failed(crew, event.worker, event.reason)
        if run is None:
            return []
        if draining:  # foretold, and so no sign that the item is to blame
            self._roster.wait_again(run.item)
            self.log.append(f"worker-{event.worker} is gone with {self._name_of(run.item)}")
            return []
        place = self._roster.place_of(event.worker)
        return self._retry(run.item, self._roster.attempts[run.item].lost(event, place), None)

    def _failed(self, event: ItemFailed) -> list[Command]:
        decision = self._roster.attempts[event.item].failed(
            event, self._roster.place_of(event.worker)
        )
        return self._retry(event.item, decision, event.error)

    def _retry(
        self, number: int, decision: policies.Decision, cause: Exception | None
    ) -> list[Command]:
        if not decision.yes:
            return [Abort(item=number, reason=decision.reason, cause=cause)]
        self._roster.wait_again(number)
        self.log.append(f"retrying {self._name_of(number)} {decision.reason}")
        return []

    def _stuck(self) -> list[Command]:
        """An abort if something waits that nobody will ever do."""
        for device in self._roster.backlog.devices:
            crews = self._roster.able(device)
            if all(crew.hopeless for crew in crews):
                last = crews[-1] if crews else None
                what = last.closed if last else f"there are no {device} workers"
                return [Abort(item=None, reason=str(what), cause=last.cause if last else None)]
        return []

    def _find_stragglers(self, now: float) -> None:
        """Note which items take far longer than others did; have them wait once more, if nothing
        else does.
        """
        usual = {rank: self._usual(rank) for rank in {item.rank for item in self._running()}}
        for crew in self._roster.crews:
            for worker, run in crew.running.items():
                item = self._roster.items[run.item]
                decision = policies.give_out_again(now - run.since, item.cost, *usual[item.rank])
                if not decision.yes:
                    continue
                crew.late.add(worker)
                if self._roster.backlog or self._roster.attempts[run.item].workers != {worker}:
                    continue
                self._roster.attempts[run.item].tried.append(self._roster.place_of(worker))
                self._roster.backlog.add(run.item, item)
                name = f"{self._name_of(run.item)} to a second worker beside worker-{worker}"
                self.log.append(f"giving {name}: {decision.reason}")

    def _running(self) -> Iterator[Item]:
        return (
            self._roster.items[run.item]
            for crew in self._roster.crews
            for run in crew.running.values()
        )

    def _usual(self, rank: int) -> tuple[float | None, float]:
        """What items of this rank usually take, a byte, and the pace of the fastest crew."""
        paces = [pace for crew in self._roster.crews for pace in crew.paces(rank)]
        fastest = min(
            policies.pace_of(crew, rank, self._roster.crews) for crew in self._roster.crews
        )
        return policies.usual_pace(paces), fastest

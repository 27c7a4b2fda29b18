"""One merge on Ray: what is to be done, and what follows from each result."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from actors.events import ItemDone, ItemFailed
from actors.kept_collector import KeptCollector
from cluster.loop import Loop
from cluster.tasks import PROVING, VERIFYING, Task, checking, merging
from merge_core.commit import check_of
from merge_core.errors import InputError, LeaseLostError, RaymeldError, counted
from merge_core.history import History
from merge_core.ledger import Receipt
from merge_core.plan import MergePlan
from merge_core.stores.location import Location
from merge_core.verify import FileCheck, FileResult, VerifyReport, verify

AT_ONCE = {"structure": "structure", "digest": "digest", "load": "digest"}
"""Levels of which a file's part is checked as soon as its shard is accepted: then idle workers have
something to do while the last shards are merged. Numeric needs the whole result first."""


@dataclass(slots=True)
class Merging:
    """The tasks of a merge, and what became of them.

    Args:
        plan: sealed.
        out: where to merge to.
        level: of the verification that follows.
        collector: takes the parts.
        history: takes every decision.
    """

    plan: MergePlan
    out: Location
    level: str
    collector: KeptCollector
    history: History
    _loop: Loop = field(init=False)
    _proofs: dict[int, int] = field(default_factory=dict)
    """The shard that each open proof is about, by its task."""
    _checks: bool = True
    """Whether anything is verified: not before the last stage."""
    _found: int = 0
    _refuted: int = 0
    _results: dict[FileCheck, FileResult] = field(default_factory=dict)

    def run(self, loop: Loop) -> int:
        """Have every shard merged and accepted that is not done; how many an earlier run had done.

        Raises:
            RaymeldError: see ``Loop.run``.
        """
        self._loop = loop
        found: dict[int, FileCheck] = self._call("resume")
        shards, self._found = self.plan.shards, len(found)
        proofs = [checking(found[n], shards[n].size, PROVING) for n in found]
        self._proofs = dict(zip(loop.add(proofs), found, strict=True))
        missing = {shard.index for shard in shards} - found.keys()
        loop.add([self._merging(index) for index in sorted(missing & self.plan.stage)])
        self._checks = missing <= self.plan.stage  # otherwise the last stage proves them all
        loop.schedule.holds = self._checks and self.level not in AT_ONCE
        loop.run()
        return self._found - self._refuted

    def verify(self, loop: Loop) -> VerifyReport:
        """Have the record written, and everything checked that was not checked already."""
        loop.schedule.holds = False
        self._call("write_record")
        return verify(self.out, self.level, committed=False, run=self._check)

    def publish(self, verified: Mapping[str, Any]) -> None:
        """Have the collector publish, see ``merge_core.verdict.conclude``."""
        self._call("publish", verified)

    def settle(self, event: ItemDone) -> ItemDone | ItemFailed:
        """What follows from a result; a merged part is done only when it has been accepted."""
        task = self._loop.tasks[event.item]
        if task.method == "merge":
            return self._accept(event)
        shard = self._proofs.pop(event.item, None)
        if shard is not None and event.result.findings:
            self._refute(shard)
        else:
            self._results[task.argument] = event.result
        if shard is not None and not self._proofs:
            self._say_proven()
        return event

    def _accept(self, event: ItemDone) -> ItemDone | ItemFailed:
        receipt: Receipt = event.result
        try:
            self._call("accept", receipt)
        except (InputError, LeaseLostError):  # no other attempt would change it
            raise
        except RaymeldError as error:
            return ItemFailed(worker=event.worker, item=event.item, error=error)
        self.history.note(receipt.note)
        if self._checks and self.level in AT_ONCE:
            shard = self.plan.shards[receipt.shard]
            check = check_of(self.out, shard.name, receipt, AT_ONCE[self.level])
            self._loop.add([checking(check, shard.size, VERIFYING)])
        return event

    def _merging(self, shard: int) -> Task:
        ahead = not (self.plan.base.is_local or self.plan.base.access.cache)
        return merging(self.plan.shards[shard], read_ahead=ahead)

    def _refute(self, shard: int) -> None:
        """Have a shard that failed its proof merged again."""
        self._refuted += 1
        name = self.plan.shards[shard].name
        self.history.say(f"{name} is not as its receipt says; merging it again")
        self._call("forget", shard)
        self._loop.add([self._merging(shard)])

    def _say_proven(self) -> None:
        proven = self._found - self._refuted
        shards = counted(len(self.plan.shards), "shard")
        self.history.say(f"{proven} of {shards} were there and are proven")

    def _check(
        self, _check_file: Callable[[FileCheck], FileResult], checks: Sequence[FileCheck]
    ) -> Iterable[FileResult]:
        """Spread the checks of a verification over the workers.

        The function is what ``Checker.check`` calls on the other side.
        """
        sizes = {shard.name: shard.size for shard in self.plan.shards}
        missing = [check for check in checks if check not in self._results]
        self._loop.add([checking(check, sizes[check.file.name], VERIFYING) for check in missing])
        self._loop.run()
        return [self._results[check] for check in checks]

    def _call(self, method: str, *arguments: Any) -> Any:
        try:
            return self.collector.call(method, *arguments)
        finally:
            for line in self.collector.log:
                self.history.say(line)
            self.collector.log.clear()

"""What OUT holds of a merge, read once: the only module of the report that looks at it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from cluster.status import Status, read_status
from merge_core.errors import StorageError, refuse
from merge_core.history import read_runs
from merge_core.ledger import Receipt, rows_of, unfold_ledger
from merge_core.output import LEDGER, VERIFIED, accepted_shards, read_plan, receipt_name
from merge_core.stores.location import Location
from merge_core.stores.opening import is_there, read_file

Row = dict[str, Any]
"""Of a tensor, see ``merge_core.ledger``; of a shard, see ``Receipt.about``, and its ``file``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """All that is known of a merge, finished or not."""

    status: Status
    plan: Mapping[str, Any]
    """plan.json."""
    tensors: tuple[Row, ...]
    """Those that are done."""
    shards: tuple[Row, ...]
    """Those that are done; empty in ledgers of versions that kept nothing of them."""
    runs: tuple[dict[str, Any], ...]
    """See ``merge_core.history``; the oldest first, none of versions that kept no history."""
    verified: Mapping[str, Any] | None
    """What the last verification found, see ``describe_report``."""

    @property
    def planned(self) -> int:
        """How many tensors the result has."""
        return sum(len(shard["tasks"]) for shard in self.plan["shards"])

    @property
    def tasks(self) -> Iterator[Mapping[str, Any]]:
        """Every ``TensorTask`` of the plan, as plan.json has it."""
        return (task for shard in self.plan["shards"] for task in shard["tasks"])

    @property
    def last_run(self) -> Mapping[str, Any]:
        """The latest one; empty if none was kept."""
        return self.runs[-1] if self.runs else {}

    @property
    def attempts(self) -> Iterator[Mapping[str, Any]]:
        """All that left no receipt, in all runs."""
        return (attempt for run in self.runs for attempt in run["attempts"])


def read_evidence(out: Location) -> Evidence:
    """Everything that ``out`` holds.

    Raises:
        InputError: it holds no merge of raymeld's, or one whose ledger cannot be read.
    """
    status, plan = read_status(out), read_plan(out)
    if plan is None:
        raise refuse("its plan.json is not one of raymeld's", str(out), "Merge again into another")
    names = [shard["name"] for shard in plan["shards"]]
    receipts = _receipts(out, str(plan["fingerprint"]), len(names))
    if receipts:
        tensors = [row for one in receipts for row in rows_of(one, names[one.shard])]
        shards = [{**one.about, "file": names[one.shard]} for one in receipts]
    else:
        tensors, shards = _recorded(out, finished=status.state == "finished")
    runs = read_runs(out)
    return Evidence(
        status=status,
        plan=plan,
        tensors=tuple(tensors),
        shards=tuple(shards),
        runs=tuple(runs),
        verified=_verified(out, runs, finished=status.state == "finished"),
    )


def _receipts(out: Location, fingerprint: str, shards: int) -> list[Receipt]:
    found = []
    for index in sorted(accepted_shards(out)):
        with contextlib.suppress(
            StorageError, ValueError, TypeError, KeyError
        ):  # merged again then
            receipt = Receipt.from_json(read_file(out / receipt_name(index)))
            if receipt.fingerprint == fingerprint and 0 <= receipt.shard < shards:
                found.append(receipt)
    return found


def _recorded(out: Location, *, finished: bool) -> tuple[list[Row], list[Row]]:
    file = out / LEDGER
    if not finished and not is_there(file):
        return [], []
    try:
        tensors, about = unfold_ledger(read_file(file))
    except (StorageError, ValueError, KeyError) as error:
        what = f"its ledger cannot be read ({error})"
        raise refuse(what, str(file), "Merge again with --overwrite") from error
    return tensors, about.get("shards", [])


def _verified(
    out: Location, runs: list[dict[str, Any]], *, finished: bool
) -> dict[str, Any] | None:
    if finished:
        with contextlib.suppress(StorageError, ValueError):
            kept = json.loads(read_file(out / VERIFIED))
            return kept if isinstance(kept, dict) else None
    return next((run["verification"] for run in reversed(runs) if run["verification"]), None)

"""The merge's own engine with the arithmetic taken out: what is left is the limit of this disk.

    python benchmarks/copy_engine.py BASE ADAPTER OUT

Plans like a merge, forgets every update and the adapter, and streams each byte as it is.
"""

from __future__ import annotations

import dataclasses
import sys

from merge_core.merge import merge
from merge_core.plan import MergePlan, Shard
from merge_core.planner import make_plan


def without_arithmetic(plan: MergePlan) -> MergePlan:
    shards = tuple(_copied(shard) for shard in plan.shards)
    return dataclasses.replace(plan, shards=shards, adapters=())


def _copied(shard: Shard) -> Shard:
    tasks = tuple(dataclasses.replace(task, updates=()) for task in shard.tasks)
    return dataclasses.replace(shard, tasks=tasks)


if __name__ == "__main__":
    base, adapter, out = sys.argv[1:]
    merge(without_arithmetic(make_plan(base, [adapter])), out, level="structure")

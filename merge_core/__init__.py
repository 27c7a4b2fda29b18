"""The merge as a library: runs on one machine, without Ray.

    from merge_core.planner import make_plan
    from merge_core.merge import merge
    from merge_core.verify import verify

    plan = make_plan("Qwen1.5-7B", ["my-lora"])  # headers only; refuses what it does not know
    merge(plan, "merged")
    verify("merged", "numeric")

Opening a checkpoint and an adapter, making a plan, streaming each shard, writing the ledger,
committing and verifying are one module each.
"""

__version__ = "0.1.0"

"""How a merge scales over nodes when the bandwidth of each node is the limit. Linux only.

    python benchmarks/scale.py --dir /tmp --results

All nodes are on this machine (``ray.cluster_utils.Cluster``), with one worker each, whose reads and
writes are throttled (see ``throttled``). Everything else is real: Ray, processes, the arithmetic,
the files, the fsyncs, the driver. Shards are small, so that few workers wait for the last ones.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import machine
import throttled
from checkpoints import config, make_adapter, make_checkpoint
from report import Page

from cluster import estimate
from cluster.driver import merge_on_ray
from cluster.workers import ClusterOptions
from merge_core.plan import MergePlan
from merge_core.planner import make_plan

SHAPES = config("0.5B") | {
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 64,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "vocab_size": 1024,
    "tie_word_embeddings": False,
}
"""Equal layers of 14 MB, of tensors small enough that all lanes have something to do."""

SHARD_BYTES = 16_000_000
"""A shard a layer: 64 of them."""

COUNTS = (1, 2, 4, 8)


def main() -> None:
    options = _options()
    facts = machine.describe(options.dir)
    runs: dict[int, list[dict[str, float]]] = {count: [] for count in COUNTS}
    with tempfile.TemporaryDirectory(dir=options.dir) as scratch, _cluster(max(COUNTS)) as address:
        base, adapter, out = (Path(scratch) / name for name in ("base", "adapter", "out"))
        make_checkpoint(SHAPES, base)
        make_adapter(SHAPES, adapter)
        plan = make_plan(base, [adapter], shard_bytes=SHARD_BYTES)
        for number in range(options.rounds):
            for count in COUNTS if number % 2 == 0 else COUNTS[::-1]:
                runs[count].append(_merge(plan, out, address, count, options.bandwidth * 1e6))
                print(f"round {number + 1}: {count} workers, {runs[count][-1]}", file=sys.stderr)
    wanted = {count: _estimated(plan, count, options.bandwidth * 1e6) for count in COUNTS}
    page = Page(
        title="Scaling over throttled nodes",
        machine=facts,
        table=list(_table(runs, wanted)),
        notes=_notes(plan, options.rounds, options.bandwidth),
        runs={str(count): each for count, each in runs.items()},
    )
    page.show(keep_as="scale" if options.results else None)


def _notes(plan: MergePlan, rounds: int, bandwidth: float) -> list[str]:
    size = f"{plan.total_size / 1e6:.0f} MB in {len(plan.shards)} shards"
    gate = f"{bandwidth:g} MB/s from the storage and as much to it"
    return [
        f"{size}, rank 16; {rounds} rounds, medians; every byte read back before the commit",
        f"throttled: one worker a node, {gate}; all nodes are processes on one machine",
        "seconds: from the first shard that was handed out to config.json",
        "of linear: the seconds of one worker, over this many times these",
        "estimated: what raymeld plan says of these seconds",
        "no worker begins before all are up: they start on one machine, which nodes do not",
        "whole: seconds of the merge with that start",
        "load: the machine's, a minute's mean at the end; it has other work to do as well",
    ]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dir", type=Path, default=Path("/tmp"), help="with 2 GB of room")
    parser.add_argument("--bandwidth", type=float, default=20.0, help="MB/s of a node, each way")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--results", action="store_true", help="write to benchmarks/results")
    return parser.parse_args()


@contextlib.contextmanager
def _cluster(nodes: int) -> Iterator[str]:
    """A head without CPUs and nodes with one each, in processes of their own; its address."""
    os.environ |= {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    import ray
    from ray._common.utils import get_default_ray_temp_dir
    from ray.cluster_utils import Cluster

    ray.cloudpickle.register_pickle_by_value(throttled)
    Path(get_default_ray_temp_dir()).mkdir(parents=True, exist_ok=True)
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False}
    )
    try:
        for _ in range(nodes):
            cluster.add_node(num_cpus=1)
        yield cluster.address
    finally:
        cluster.shutdown()


def _merge(
    plan: MergePlan, out: Path, address: str, workers: int, bandwidth: float
) -> dict[str, float]:
    shutil.rmtree(out, ignore_errors=True)
    kind = type(
        "Merger", (throttled.ThrottledMerger,), {"bandwidth": bandwidth, "workers": workers}
    )
    options = ClusterOptions(address=address, workers=workers, merger=kind)
    result = merge_on_ray(plan, out, options, watch=lambda _: None, say=lambda _: None)
    first = min(receipt.started for receipt in result.receipts)
    merged = max(receipt.started + receipt.seconds for receipt in result.receipts)
    return {
        "seconds": (out / "config.json").stat().st_mtime - first,
        "merging": merged - first,
        "whole": result.seconds,
        "load": os.getloadavg()[0],
    }


def _estimated(plan: MergePlan, workers: int, bandwidth: float) -> float:
    """From the first shard on: without the start, and the driver's look at the adapter."""
    machines = estimate.Machines(nodes=workers, network=bandwidth)
    adapter = plan.adapters[0].file.size
    before = estimate.START_SECONDS + adapter / bandwidth + adapter / estimate.SEAL_SPEED
    return estimate.estimate(plan, machines, "digest").seconds - before


def _table(runs: dict[int, list[dict[str, float]]], estimated: dict[int, float]) -> Iterator[str]:
    yield (
        "| workers | seconds | min-max | of linear | estimated | last shard merged | whole | load |"
    )
    yield "|--:|" + "--:|" * 7
    alone = median(run["seconds"] for run in runs[1])
    for count, each in runs.items():
        seconds = [run["seconds"] for run in each]
        merging, whole, load = (
            median(run[name] for run in each) for name in ("merging", "whole", "load")
        )
        share = alone / count / median(seconds)
        yield (
            f"| {count} | {median(seconds):.2f} | {min(seconds):.2f}-{max(seconds):.2f}"
            f" | {share:.0%} | {estimated[count]:.2f} | {merging:.2f} | {whole:.2f} | {load:.1f} |"
        )


if __name__ == "__main__":
    main()

"""Whatever process dies at whatever step: the merge goes on, to the same bytes, and tidily."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kills
import pytest
from aftermath import actors_of, assert_tidy
from clusters import cluster, environment
from handmade import published
from head import until
from kills import Kill

from cluster.driver import merge_on_ray
from cluster.workers import ClusterOptions
from merge_core.merge import merge
from merge_core.plan import MergePlan

MARK = "raymeld-test-kills"


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    kills.by_value()
    with environment(RAYMELD_TEST=MARK), cluster(cpus=2) as nodes:
        yield nodes.address


@pytest.fixture(scope="module")
def expected(small: MergePlan, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("inline") / "out"
    merge(small, out)
    return published(out)


def worker(place: str, about: str = "") -> Kill:
    return Kill(victim="worker", place=place, about=about)


def collector(place: str, about: str = "") -> Kill:
    return Kill(
        victim="collector", place=f"{place.replace(' ', ' merge_core.commit:')}", about=about
    )


@pytest.mark.parametrize(
    "deaths",
    [
        [
            worker("before merge_core.worker:ShardWorker.__init__"),
            worker("after merge_core.storage:PartFile.__init__", "model-00001"),
            worker("before actors.checker:check_file", "model-00004"),
        ],
        [
            worker("before merge_core.worker:ShardWorker.merge"),
            worker("after merge_core.storage:PartFile.write_small"),
            worker("after merge_core.storage:PartFile.finish"),
            worker("after merge_core.worker:ShardWorker.merge"),
            worker("after actors.checker:check_file"),
        ],
        [
            collector("before Assembly.resume"),
            collector("before Assembly.accept", "shard=0,"),
            collector("before Assembly._publish_shard", "shard=1,"),
            collector("before Assembly.write_record"),
            collector("before Assembly.publish"),
            collector("before remove_leftovers"),
        ],
        [
            collector("after Assembly._publish_shard", "shard=0,"),
            collector("after Assembly.accept", "shard=1,"),
            collector("before fold_ledger"),
            collector("after fold_ledger"),
            collector("before check_unchanged", ""),
            collector("after remove_leftovers"),
        ],
    ],
    ids=["worker", "worker in a shard", "collector", "collector in between"],
)
def test_a_worker_or_a_collector_that_dies_is_replaced_and_nothing_is_lost(
    small: MergePlan,
    expected: dict[str, bytes],
    address: str,
    tmp_path: Path,
    deaths: list[Kill],
) -> None:
    ahead = kills.marked(deaths, tmp_path / "marks")
    options = ClusterOptions(address=address, device="cpu", workers=2, **kills.classes(ahead))

    said: list[str] = []

    result = merge_on_ray(small, tmp_path / "out", options, watch=lambda _: None, say=said.append)

    assert [kill for kill in ahead if not kill.happened] == []
    assert sum("starting another" in line or "after failure" in line for line in said) == len(ahead)
    assert [receipt.shard for receipt in result.receipts] == list(range(len(small.shards)))
    assert published(tmp_path / "out") == expected
    assert_tidy(tmp_path / "out")
    until(lambda: not actors_of(MARK))


def test_a_driver_that_dies_at_any_step_loses_nothing_that_was_done(
    small: MergePlan, expected: dict[str, bytes], address: str, tmp_path: Path
) -> None:
    """The same command, again and again."""
    out = tmp_path / "out"
    deaths = [
        "before cluster.driver:Pool",
        "after cluster.merging:Merging._accept",
        "before cluster.merging:Merging._say_proven",
        "before cluster.merging:Merging.verify",
        "after cluster.merging:verify",
        "after cluster.merging:Merging.publish",
    ]
    ahead = kills.marked([Kill(victim="driver", place=p) for p in deaths], tmp_path / "marks")
    merge_again: list[Any] = ["merge", small.base, small.adapters[0].path, "--out", out]
    merge_again += ["--shard-size", "18kB", "--address", address, "--device", "cpu"]
    for kill in [*ahead, None]:
        ended = subprocess.run(
            kills.command([kill] if kill else [], *merge_again), capture_output=True, text=True
        )
        if kill:
            assert (ended.returncode, kill.happened) == (-signal.SIGKILL, True), ended.stderr
            assert kill is ahead[-1] or not (out / "config.json").exists()
    assert ended.returncode == 0, ended.stderr
    assert published(out) == expected
    assert_tidy(out)
    until(lambda: not actors_of(MARK))

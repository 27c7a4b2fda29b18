"""A Ray cluster whose metrics can be read as Prometheus reads them, and drivers that leave some.

Each driver is a process of its own: Ray reports what later ones of one process count several times.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faults
from clusters import cluster
from head import free_ports, until
from prometheus_client.parser import text_string_to_metric_families

from cluster.checking import verify_on_ray
from cluster.driver import merge_on_ray
from cluster.workers import ClusterOptions
from merge_core.merge import MergeResult
from merge_core.plan import MergePlan
from merge_core.progress import Progress
from merge_core.stores.location import locate
from merge_core.verify import VerifyReport

RAYS_OWN = {"Component", "NodeAddress", "SessionName", "Version", "WorkerId"}
"""Labels that every metric has."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One of our lines in what Prometheus reads."""

    name: str
    labels: dict[str, str]
    value: float

    @property
    def tags(self) -> tuple[str, ...]:
        """The values of our own labels, in the order of their names."""
        own = {k: v for k, v in self.labels.items() if k not in RAYS_OWN and "otel" not in k}
        return tuple(own[key] for key in sorted(own))


def values(samples: list[Sample], name: str) -> dict[tuple[str, ...], float]:
    return {each.tags: each.value for each in samples if each.name == f"ray_raymeld_{name}"}


@dataclass(frozen=True)
class Scraped:
    """The cluster, as Prometheus and a driver see it."""

    address: str
    port: int

    def scrape(self) -> list[Sample]:
        url = f"http://127.0.0.1:{self.port}/metrics"
        with urllib.request.urlopen(url, timeout=10) as answer:
            families = text_string_to_metric_families(answer.read().decode())
        return [
            Sample(name=sample.name, labels=sample.labels, value=sample.value)
            for family in families
            for sample in family.samples
            if sample.name.startswith("ray_raymeld_")
        ]

    def drive(self, function: Callable[..., Any], *arguments: Any) -> tuple[Any, list[Sample]]:
        """What a driver returns, and what it has reported when it has ended."""
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            return process.submit(self._drive, function, *arguments).result()

    def _drive(self, function: Callable[..., Any], *arguments: Any) -> tuple[Any, list[Sample]]:
        os.environ |= {"RAY_metrics_report_interval_ms": "1000"}
        before = self._drivers()
        result = function(self, *arguments)
        until(lambda: self._drivers() - before, what="a report of the driver")
        (driver,) = self._drivers() - before
        return result, [each for each in self.scrape() if each.labels["WorkerId"] == driver]

    def _drivers(self) -> set[str]:
        return {each.labels["WorkerId"] for each in self.scrape()}


@contextlib.contextmanager
def scraped_cluster(cpus: int) -> Iterator[Scraped]:
    """A head that forgets what drivers showed last only 20 seconds after they have ended."""
    (port,) = free_ports(1)
    with cluster(cpus=cpus, metrics_port=port) as nodes:
        yield Scraped(nodes.address, port)


def merge_in_trouble(
    where: Scraped, plan: MergePlan, out: Path
) -> tuple[MergeResult, bool, list[str]]:
    """A merge with two workers that fails in every way before it succeeds, whether Prometheus could
    see the two at work, and what was said.
    """
    shown, patience, said = False, 60, list[str]()

    def watch(progress: Progress) -> None:
        nonlocal shown, patience
        patience -= 1
        assert patience, "the gauges never showed two workers at work"
        gauges = [values(where.scrape(), name) for name in ("in_flight", "workers")]
        if gauges == [{("cpu",): 2}, {("cpu",): 2}]:
            shown = True
            (out / ".raymeld" / "go").touch()

    faults.by_value()
    options = ClusterOptions(address=where.address, workers=2, merger=faults.FailsInEveryWay)
    result = merge_on_ray(plan, out, options, watch=watch, say=said.append)
    return result, shown, said


def verify_there(where: Scraped, out: Path) -> VerifyReport:
    options = ClusterOptions(address=where.address, device="cpu")
    return verify_on_ray(locate(out), "digest", options, watch=lambda _: None, say=lambda _: None)


def verify_three_times(where: Scraped, out: Path) -> None:
    for _ in range(3):
        assert verify_there(where, out).ok

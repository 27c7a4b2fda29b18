"""How many workers of which size a cluster gets, and which workers a driver refuses."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from actors.identity import Identity
from cluster.workers import ClusterOptions, size_fleet
from merge_core.errors import InputError

ONE_GPU = {"num_gpus": 1, "num_cpus": 0}


@pytest.mark.parametrize(
    ("options", "nodes", "shards", "device", "resources", "most"),
    [
        ({}, [{"GPU": 8, "CPU": 64}, {"CPU": 9}], 82, "cuda", ONE_GPU, 8),
        ({}, [{"GPU": 8}], 3, "cuda", ONE_GPU, 3),
        ({"gpus_per_worker": 0.1}, [{"GPU": 1}], 99, "cuda", {"num_gpus": 0.1, "num_cpus": 0}, 10),
        ({"gpus_per_worker": 2}, [{"GPU": 3}] * 2, 99, "cuda", {"num_gpus": 2, "num_cpus": 0}, 2),
        ({"workers": 5}, [{"GPU": 2}], 99, "cuda", ONE_GPU, 5),
        ({"device": "cpu"}, [{"GPU": 8, "CPU": 64}], 99, "cpu", {"num_cpus": 4, "num_gpus": 0}, 16),
        ({}, [{"CPU": 2}, {}], 99, "cpu", {"num_cpus": 2, "num_gpus": 0}, 1),
        ({"workers": 3}, [{"CPU": 8}], 99, "cpu", {"num_cpus": 2, "num_gpus": 0}, 3),
        ({"workers": 4}, [{"CPU": 2}], 99, "cpu", {"num_cpus": 0.5, "num_gpus": 0}, 4),
    ],
)
def test_the_pool_is_sized_by_what_the_nodes_have(
    options: Any, nodes: Any, shards: int, device: str, resources: Any, most: int
) -> None:
    fleet = size_fleet(ClusterOptions(address="local", **options), nodes, shards)

    (worker,), (kind,) = fleet.workers, fleet.kinds
    assert (worker.device, worker.resources) == (device, resources)
    assert (kind.name, kind.most) == (device, most)


def test_workers_that_fit_by_number_but_not_by_node_get_a_share_that_lets_all_start() -> None:
    fleet = size_fleet(ClusterOptions(address="local", workers=3), [{"CPU": 6}] * 2, 99)

    assert fleet.kinds[0].most == 3
    assert 2 * int(6 / fleet.workers[0].resources["num_cpus"]) >= 3


@pytest.mark.parametrize(
    ("options", "nodes", "said"),
    [
        ({"device": "cuda"}, [{"CPU": 8}], "no node that is up can hold a worker with 1 GPU"),
        (
            {"gpus_per_worker": 4},
            [{"GPU": 2}] * 2,
            "no node that is up can hold a worker with 4 GPU",
        ),
        ({"gpus_per_worker": 1.5}, [{"GPU": 8}], "--gpus-per-worker"),  # Ray has no such thing
        ({"device": "cpu"}, [{"GPU": 2}], "no node that is up can hold a worker with 2 CPU"),
        ({"device": "cuda", "workers": 2}, [{"CPU": 8}], "with 1 GPU"),  # this machine cannot grow
        ({}, [{}], "no node that is up can hold a worker with 2 CPU"),
    ],
)
def test_workers_that_no_node_could_hold_are_refused(options: Any, nodes: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        size_fleet(ClusterOptions(address="local", **options), nodes, 9)


DRIVER = Identity(
    host="a",
    pid=1,
    python="3.11.9",
    raymeld="1",
    torch="2.5.1+cu124",
    paths=("/p/cluster", "/p/actors", "/p/merge_core"),
    digest="same",
)
MOVED = {"digest": "other", "paths": ("/p/cluster", "/home/actors", "/p/merge_core")}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"host": "b", "pid": 2, "python": "3.12.1"}, None),
        ({"paths": ("/elsewhere", "/x", "/y")}, None),
        ({"torch": "2.5.9+cpu"}, None),
        ({"torch": "2.6.0"}, "has torch 2.6.0, the driver 2.5.1+cu124"),
        ({"raymeld": "9", "digest": "other"}, "has raymeld 9, the driver 1"),
        ({"digest": "other"}, "has other source files than the driver, in /p/cluster"),
        (MOVED, "imports 'actors' from /home/actors, the driver from /p/actors"),
    ],
)
def test_a_worker_that_runs_other_code_says_what_differs(changes: Any, said: str | None) -> None:
    worker = dataclasses.replace(DRIVER, **changes)

    assert worker.difference(DRIVER) == said


@pytest.mark.parametrize(
    ("options", "device", "resources"),
    [
        ({}, "cuda", {"num_gpus": 1, "num_cpus": 0}),
        ({"device": "cuda"}, "cuda", {"num_gpus": 1, "num_cpus": 0}),
        ({"device": "cpu"}, "cpu", {"num_gpus": 0, "num_cpus": 2}),
    ],
)
def test_workers_that_were_asked_for_are_waited_for_where_no_node_is_up(
    options: Any, device: str, resources: dict[str, float]
) -> None:
    asked = ClusterOptions(address="head:6379", workers=3, **options)
    fleet = size_fleet(asked, [{"CPU": 0}], 10)

    (worker,) = fleet.workers
    assert (worker.device, worker.resources, fleet.kinds[0].most) == (device, resources, 3)


def test_cpu_workers_stand_beside_gpu_workers() -> None:
    options = ClusterOptions(address="local", cpu_workers=3)
    fleet = size_fleet(options, [{"GPU": 2, "CPU": 8}], 99)

    assert [worker.resources for worker in fleet.workers] == [
        {"num_gpus": 1, "num_cpus": 0},
        {"num_cpus": 2, "num_gpus": 0},
    ]
    assert fleet.lines == [
        "workers: at most 2 on cuda, each with 1 GPU",
        "workers: at most 3 on cpu, each with 2 CPU",
    ]
    assert fleet.kinds[1].handicap > fleet.kinds[0].handicap


@pytest.mark.parametrize(
    ("options", "nodes", "pinned", "said"),
    [
        ({"cpu_workers": 2}, [{"CPU": 8}], (), "no GPU workers that CPU workers could stand"),
        ({"device": "cpu", "cpu_workers": 2}, [{"GPU": 8, "CPU": 8}], (), "--cpu-workers"),
        ({}, [{"GPU": 8, "CPU": 8}], ["cpu"], "pinned to cpu.*all workers are on cuda.*--cpu-work"),
        ({}, [{"CPU": 8}], ["cpu", "cuda"], "pinned to cuda, and all workers are on cpu"),
    ],
)
def test_options_that_no_fleet_can_honour_are_refused(
    options: Any, nodes: Any, pinned: Any, said: str
) -> None:
    with pytest.raises(InputError, match=said):
        size_fleet(ClusterOptions(address="local", **options), nodes, 9, pinned)

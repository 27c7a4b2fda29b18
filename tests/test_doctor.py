"""raymeld doctor on a real Ray: every node is looked at, and what is wrong with it is told."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from clusters import cluster, environment, joined
from fault_proxy import FaultProxy
from handmade import files_below, small_merge

from actors.examiner import DeviceView, ExaminedNode, Examiner, PathSight, Silence
from actors.identity import Identity
from cluster.diagnosis import diagnose
from cluster.doctor import Checkup, Intent, examine
from cluster.findings import Finding
from cluster.session import session
from merge_core.stores.location import Upload, locate, onto_hub

PATIENCE = 60.0
TOOL = """#!/bin/sh
case "$*" in
*--query-gpu=*) echo '0, GPU-1, 1, NVIDIA H100'; echo '1, GPU-2, 81037, NVIDIA H100';;
*--query-compute-apps=*) echo 'GPU-1, 4711, 80000, /usr/bin/python3';;
esac
"""
"""Stands in for nvidia-smi: of two GPUs the first is full."""

UNAPART = {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds base, adapter, and a directory for results."""
    path = tmp_path_factory.mktemp("doctor")
    small_merge(path)
    (path / "results").mkdir()
    return path


@pytest.fixture(scope="module")
def nodes() -> Iterator[Any]:
    """Two nodes that are well."""
    with cluster(cpus=2) as both:
        both.add_node(num_cpus=1)
        yield both


def looked_at(
    address: str, paths: Path, out: Path, *, more: Sequence[str] = (), seconds: float = PATIENCE
) -> Checkup:
    adapters = [f"{paths / 'adapter'}@0.5", *more]
    before = files_below(paths)
    with environment():
        intent = Intent(base=locate(paths / "base"), adapters=adapters, out=locate(out))
        checkup = examine(address, intent, seconds=seconds, say=lambda _: None)
    assert files_below(paths) == before
    return checkup


def raymeld(*words: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    return subprocess.run(
        [Path(sys.executable).with_name("raymeld"), "doctor", *map(str, words)],
        env={**kept, "HOME": str(cwd), "RAY_AUTH_MODE": "disabled"},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_cluster_that_is_well_ends_with_exit_code_0(
    nodes: Any, paths: Path, tmp_path: Path
) -> None:
    words = paths / "base", paths / "adapter", "--out", paths / "results" / "deep" / "out"
    done = raymeld(*words, "--address", nodes.address, "--json", cwd=tmp_path)

    assert done.returncode == 0, done.stdout + done.stderr
    document = json.loads(done.stdout)
    assert (document["ok"], document["problems"], document["token"]) == (True, [], False)
    assert [one["cpus_of_ray"] for one in document["nodes"]] in ([1, 2], [2, 1])
    assert len({one["name"] for one in document["nodes"]}) == 2  # though on one machine
    for one in document["nodes"]:
        assert one["difference"] is None
        assert one["identity"]["digest"] == document["driver"]["digest"]
        assert one["libraries"]["peft"] == document["driver"]["libraries"]["peft"]
        assert [sight["difference"] for sight in one["inputs"]] == [None, None]
        assert one["out"] == {"refusal": None, "arrived": True}
        assert one["lanes"] == 8
    assert list((paths / "results").iterdir()) == []


def test_each_node_is_asked_for_its_scratch_and_reaches_the_state(
    nodes: Any, tmp_path: Path, before_hub: FaultProxy
) -> None:
    upload = Upload(state=locate(tmp_path / "state"), scratch=str(tmp_path / "scratch"))
    with environment():
        out = onto_hub(locate("hf://me/merge"), upload)
        intent = Intent(base=None, adapters=[], out=out)
        checkup = examine(nodes.address, intent, seconds=PATIENCE, say=lambda _: None)

    looks = [node.paths for node in checkup.nodes if isinstance(node.paths, PathSight)]
    scratches = [look.scratch.folder for look in looks if look.scratch is not None]
    assert scratches == [upload.scratch] * 2
    assert diagnose(checkup).problems == ()
    assert list(tmp_path.glob("s*")) == []
    assert before_hub.tally("PUT").requests == 0


def test_nodes_that_do_not_answer_in_time_are_named(nodes: Any, paths: Path) -> None:
    checkup = looked_at(nodes.address, paths, paths / "results", seconds=0)

    problem, *_ = diagnose(checkup).problems  # the others are of the driver's own looks
    assert problem.what == "no examiner came up: no answer within 0 s"
    assert sorted(problem.places) == sorted(node.name for node in checkup.nodes)


@pytest.fixture(scope="module")
def ill(nodes: Any, paths: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Checkup]:
    """The same cluster after four more nodes came, none of which is well."""
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode:
        pytest.skip("mounting takes root")
    user, broken, other = (tmp_path_factory.mktemp(name) for name in ("user", "broken", "other"))
    package_of_the_user(user, "cluster")
    package_of_the_user(broken, "merge_core")
    stand_in(user / "nvidia-smi")
    path = f"{user}{os.pathsep}{os.environ['PATH']}"
    with environment(PATH=path, **UNAPART):
        nodes.add_node(num_cpus=1, num_gpus=2)
    with environment(PYTHONPATH=str(user)):
        nodes.add_node(num_cpus=1)
    with environment(PYTHONPATH=str(broken)):
        nodes.add_node(num_cpus=1)
    mounts = mounted_elsewhere(paths, other)
    with joined(nodes.address, cpus=1, label="has=mounts", gpus=1, mounts=mounts):
        take_a_gpu_of(nodes)
        copied = paths / "copied"
        yield looked_at(nodes.address, paths, paths / "results" / "out", more=[str(copied)])


def package_of_the_user(directory: Path, name: str) -> None:
    (directory / name).mkdir()
    (directory / name / "__init__.py").write_text("raise RuntimeError('not ours')")


def stand_in(tool: Path) -> None:
    tool.write_text(TOOL)
    tool.chmod(0o755)


def mounted_elsewhere(paths: Path, other: Path) -> str:
    """Mounts of a node that has another base, no adapter, a copy, and results of its own."""
    shutil.copytree(paths / "base", other / "base")
    (other / "base" / "config.json").write_text("{}")
    shutil.copytree(paths / "adapter", paths / "copied")
    shutil.copytree(paths / "adapter", other / "copied", copy_function=shutil.copyfile)
    return f"""
        mount --bind {other}/base {paths}/base
        mount --bind {other}/copied {paths}/copied
        mount -t tmpfs none {paths}/adapter
        mount -t tmpfs none {paths}/results
    """


def take_a_gpu_of(nodes: Any) -> None:
    """One of the two; the actor stays when its driver has gone."""
    with environment(), session(nodes.address, use_gpus=True):
        start_a_taker(lifetime="detached", name="taker")


def start_a_taker(**options: Any) -> tuple[str, Any]:
    """An actor that holds one of the two GPUs; with the node's id."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    (two,) = (n["NodeID"] for n in ray.nodes() if n["Resources"].get("GPU") == 2)
    place = NodeAffinitySchedulingStrategy(two, soft=False)
    taker = ray.remote(num_cpus=0, num_gpus=1)(Examiner)
    actor = taker.options(scheduling_strategy=place, **options).remote("taker")
    ray.get(actor.look.remote([], None), timeout=PATIENCE)
    return two, actor


def the_one(checkup: Checkup, gpus: int) -> ExaminedNode:
    (node,) = (node for node in checkup.nodes if node.ray_gpus == gpus)
    return node


def met_on(node: ExaminedNode, findings: Sequence[Finding]) -> list[str]:
    """What is said of it, in the order of the alphabet: names of nodes, and so theirs, change."""
    mine = [one for one in findings if any(place.startswith(node.name) for place in one.places)]
    return sorted(one.what for one in mine)


def test_gpus_unfit_for_a_merge_are_told(ill: Checkup) -> None:
    node = the_one(ill, gpus=2)
    unseen, apart, full = met_on(node, diagnose(ill).problems)

    assert unseen.startswith("Ray hands out GPUs that torch cannot use: Torch not compiled with")
    assert apart.startswith("a worker that was given one GPU sees all")
    assert full.endswith("and 1 MB of VRAM; taken: 83,886 MB by /usr/bin/python3 (process 4711)")


def test_of_a_node_with_other_code_only_that_is_told(ill: Checkup) -> None:
    (node,) = (node for node in ill.nodes if isinstance(node.examination, Identity))

    (said,) = met_on(node, diagnose(ill).problems)
    assert said.startswith(f"imports 'cluster' from {node.examination.paths[0]}, the driver from")
    assert node.paths is None


def test_a_gpu_that_is_taken_is_left_alone(ill: Checkup) -> None:
    node = the_one(ill, gpus=2)

    assert (node.taken, len(node.views)) == (1, 1)
    assert met_on(node, diagnose(ill).notes) == ["GPUs are taken by other actors: 1 of 2"]


@pytest.mark.usefixtures("ill")
def test_a_gpu_that_was_taken_since_it_was_seen_free_is_waited_for(nodes: Any) -> None:
    with environment(), session(nodes.address, use_gpus=True):
        from actors.rounds import view_gpus

        node, _taker = start_a_taker()
        assert view_gpus([node], seconds=1) == [
            Silence(reason="it was taken meanwhile", kind="waiting")
        ]


def test_code_that_cannot_even_be_imported_is_told(ill: Checkup) -> None:
    (node,) = (node for node in ill.nodes if isinstance(node.examination, Silence))

    said = met_on(node, diagnose(ill).problems)
    assert said == ["no worker can start there: RuntimeError: not ours"]


def test_a_node_that_has_something_else_at_the_same_paths_is_told(
    ill: Checkup, paths: Path
) -> None:
    node = the_one(ill, gpus=1)

    others = "holds other files than the driver sees there"
    times = "is a copy with other times, which a merge takes for files that changed"
    assert met_on(node, diagnose(ill).problems) == [
        f"ADAPTER {paths}/adapter {others}: adapter_config.json is missing (2 such files)",
        f"ADAPTER {paths}/copied {times}",
        f"BASE {paths}/base {others}: config.json differs",
        f"OUT {paths}/results/out cannot be written: what the driver makes there is not seen",
        "Ray hands out GPUs that torch cannot use: Torch not compiled with CUDA enabled",
    ]
    assert [view.visible for view in node.views if isinstance(view, DeviceView)] == ["0"]
    assert list((paths / "results").iterdir()) == []


def test_without_ray_this_machine_is_examined_and_a_problem_ends_with_exit_code_1(
    paths: Path, tmp_path: Path
) -> None:
    well = raymeld(paths / "base", paths / "adapter", "--out", tmp_path / "out", cwd=tmp_path)
    (tmp_path / "file").touch()
    ill = raymeld(paths / "base", tmp_path, "--out", tmp_path / "file" / "out", cwd=tmp_path)

    looking = f"looking at {paths / 'base'}, {paths / 'adapter'}, {tmp_path / 'out'}\n"
    assert (well.returncode, well.stderr) == (0, looking)
    assert well.stdout.splitlines()[0].endswith(", without Ray")
    assert well.stdout.splitlines()[-1] == "result  no problem was found"
    assert ill.returncode == 1
    assert f"problem  {tmp_path}: has no adapter_config.json" in ill.stdout
    assert "OUT cannot be written: Not a directory" in ill.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["file"]

"""From what doctor finds to what it says: without Ray, files or GPUs."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from actors.examiner import DeviceView, Examination, ExaminedNode, GpuSight, PathSight, Silence
from actors.identity import Identity
from actors.libraries import Library
from cluster.diagnosis import diagnose
from cluster.doctor import Checkup, Destination
from cluster.findings import Diagnosis
from merge_core.errors import Problem
from merge_core.nvidia import Gpu
from merge_core.plan import MergePlan
from merge_core.reachable import FileSight, InputSight
from merge_core.stores.location import locate
from merge_core.stores.store import FileIdentity

DRIVER = Identity(
    host="head",
    pid=1,
    python="3.11.9",
    raymeld="1",
    torch="2.9.0",
    paths=("/p/cluster", "/p/actors", "/p/merge_core"),
    digest="same",
)
CPU = DeviceView(visible=None, device=None, trouble="no CUDA here", loads=True)
GPU = DeviceView(visible="0", device="NVIDIA H100", trouble=None, loads=True)
FULL, FREE = (
    GpuSight(gpu=Gpu(index=i, uuid=f"GPU-{i}", name="H100", free=free), processes=())
    for i, free in (("0", 1), ("1", 10**11))
)
TORCH = Library(name="torch", wanted=">=2.4", found="2.9.0")
FOUND = Examination(identity=DRIVER, libraries=(TORCH,), memory=10**11, gpus=(), view=CPU)
CONFIG = FileSight(
    identity=FileIdentity(name="config.json", size=2, pin="1"), digest="of the content"
)
README = replace(CONFIG, identity=replace(CONFIG.identity, name="README.md"))
BASE = InputSight(path=locate(Path("/m/base")), files=(CONFIG,), error=None)
LOOKED = PathSight(inputs=(BASE,), refusal=None)
LATE = Silence(reason="no answer within 9 s", kind="late")
TAKEN = Silence(reason="it was taken meanwhile", kind="waiting")
OUT = Destination(out=locate(Path("/m/out")), place=locate(Path("/m")), free=10**12)


def node(name: str = "n1", **changes: Any) -> ExaminedNode:
    """A node that is well, but for ``changes``; those of its examination among them."""
    inside = {k: changes.pop(k) for k in list(changes) if k in Examination.__slots__}
    well = ExaminedNode(name=name, examination=replace(FOUND, **inside), paths=LOOKED, ray_cpus=4)
    return replace(well, **changes)


def checkup(*nodes: ExaminedNode, **changes: Any) -> Checkup:
    well = Checkup(
        address="head:6379",
        driver=DRIVER,
        libraries=(),
        token=True,
        inputs=(BASE,),
        destination=OUT,
        nodes=nodes,
        plan=None,
        refusals=(),
    )
    return replace(well, **changes)


def told(diagnosis: Diagnosis) -> tuple[list[str], list[str]]:
    return [str(p) for p in diagnosis.problems], [str(n) for n in diagnosis.notes]


def test_nothing_is_said_of_nodes_that_are_well(small: MergePlan) -> None:
    with_gpu = node("n2", ray_gpus=1, views=(GPU,), gpus=(FREE,))

    assert told(diagnose(checkup(node(), with_gpu, plan=small))) == ([], [])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"examination": replace(DRIVER, raymeld="9", digest="x"), "paths": None},
            "n1: has raymeld 9, the driver 1. Install the same raymeld on every node",
        ),
        ({"identity": replace(DRIVER, torch="2.8.0")}, "n1: has torch 2.8.0, the driver 2.9.0"),
        (
            {"libraries": (Library(name="numpy", wanted=">=1.26", found="1.0"),)},
            "n1: numpy is 1.0, and should be >=1.26. Install raymeld there with all",
        ),
        (
            {"libraries": (Library(name="xxhash", wanted="", found=None),)},
            "n1: xxhash is missing, and should be there",
        ),
        (
            {"view": replace(CPU, loads=False, trouble="libc10.so: cannot open")},
            "n1: torch cannot be imported: libc10.so: cannot open",
        ),
        (
            {"examination": LATE, "paths": None},
            "n1: no examiner came up: no answer within 9 s. See Ray's logs there",
        ),
        (
            {"examination": Silence(reason="RuntimeError: not ours", kind="raised"), "paths": None},
            "n1: no worker can start there: RuntimeError: not ours. Install the same raymeld",
        ),
        (
            {"examination": Silence(reason="killed", kind="died"), "paths": None},
            "n1: its examiner died: killed. See Ray's logs there",
        ),
        (
            {"paths": LATE},
            "n1: BASE, ADAPTER and OUT cannot be looked at: no answer within 9 s. A mount whose",
        ),
        (
            {"ray_gpus": 1, "gpus": (FREE,), "views": (replace(CPU, visible="0"),)},
            "n1: Ray hands out GPUs that torch cannot use: no CUDA here. Install a torch with CUDA",
        ),
        (
            {"ray_gpus": 2, "views": (replace(GPU, visible=None),) * 2, "gpus": (FREE, FREE)},
            "n1: a worker that was given one GPU sees all",
        ),
        (
            {
                "ray_gpus": 1,
                "gpus": (FREE,),
                "views": (LATE,),
            },
            "n1: a worker with a GPU did not come up: no answer within 9 s",
        ),
        (
            {"paths": replace(LOOKED, inputs=(replace(BASE, error="Permission denied"),))},
            "n1: BASE /m/base cannot be read: Permission denied. Mount one file system",
        ),
        (
            {"paths": replace(LOOKED, inputs=(replace(BASE, files=()),))},
            "n1: BASE /m/base holds other files than the driver sees there: config.json is missing",
        ),
        (
            {"paths": replace(LOOKED, refusal="Read-only file system")},
            "n1: OUT /m/out cannot be written: Read-only file system. Mount one file system",
        ),
        ({"arrived": False}, "n1: OUT /m/out: the driver does not see what is written there"),
    ],
)
def test_what_is_wrong_with_a_node_is_a_problem(changes: dict[str, Any], said: str) -> None:
    (problem,), _ = told(diagnose(checkup(node(**changes), node("n2"))))

    assert problem.startswith(said)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"leaves_in": math.inf, "examination": None, "paths": None}, "n1: is about to leave"),
        (
            {"libraries": (Library(name="peft", wanted=">=0.20", found="0.7.1"),)},
            "n1: peft is 0.7.1, and should be >=0.20. LoRA is merged without it; other tuners",
        ),
        (
            {"libraries": ()},
            "n1: runs raymeld from a checkout, without its metadata. What raymeld",
        ),
        (
            {"paths": replace(LOOKED, inputs=(replace(BASE, files=(CONFIG, README)),))},
            "n1: BASE /m/base holds other files than the driver sees there: README.md is",
        ),
        (
            {"gpus": (FULL, FREE), "view": replace(CPU, visible="1"), "ray_gpus": 1},
            "n1: CUDA_VISIBLE_DEVICES=1 hides 1 GPU. Nothing is merged on these",
        ),
        (
            {"gpus": (FULL, FREE), "ray_gpus": 1},
            "n1: Ray hands out 1 of its 2 GPUs. Start Ray there with --num-gpus=2 to use all",
        ),
        (
            {"gpus": (FREE,), "ray_gpus": 1, "taken": 1},
            "n1: GPUs are taken by other actors: 1 of 1. No worker could look at them",
        ),
        (
            {"ray_gpus": 1, "views": (GPU,)},
            "n1: nvidia-smi tells nothing. How full its GPUs are is not known",
        ),
        (
            {"ray_gpus": 1, "gpus": (FREE,), "views": (TAKEN,)},
            "n1: a GPU was not looked at: it was taken meanwhile. A merge waits for it",
        ),
        (
            {"ray_gpus": 7, "gpus": (FULL,), "view": replace(CPU, visible="MIG-1,MIG-2")},
            "n1: its workers get slices of GPUs (MIG). How full they are is not known",
        ),
        (
            {"ray_gpus": 7, "gpus": (FULL,), "views": (replace(GPU, visible="MIG-1"),)},
            "n1: its workers get slices of GPUs (MIG). How full they are is not known",
        ),
    ],
)
def test_what_does_not_stop_a_merge_is_a_note(changes: dict[str, Any], said: str) -> None:
    problems, (note,) = told(diagnose(checkup(node(**changes), node("n2"))))

    assert (problems, note[: len(said)]) == ([], said)


def test_an_open_cluster_and_one_without_workers_are_noted(small: MergePlan) -> None:
    head = node(ray_cpus=0, memory=1)

    problems, notes = told(diagnose(checkup(head, token=False, plan=small)))
    assert problems == []
    assert [note.split(". ")[0] for note in notes] == [
        "--address head:6379: the cluster asks for no token",
        "--address head:6379: no node has a CPU or a GPU for workers",
    ]


def test_what_the_driver_cannot_read_or_write_is_said_of_the_driver() -> None:
    gone = replace(BASE, files=(), error="No such file or directory")
    refused = replace(OUT, refusal=Problem("Permission denied", "/m", "Check that."))
    problems, _ = told(diagnose(checkup(node(), inputs=(gone,), destination=refused)))

    assert [problem.split(". ")[0] for problem in problems] == [
        "the driver: BASE /m/base cannot be read: No such file or directory",
        "/m: OUT cannot be written: Permission denied",
    ]


def test_a_base_or_an_adapter_without_its_config_is_a_problem_everywhere() -> None:
    bare = replace(BASE, files=())
    looked = replace(LOOKED, inputs=(bare,))

    (problem,), _ = told(diagnose(checkup(node(paths=looked), inputs=(bare,))))
    assert problem.startswith("the driver, n1: BASE /m/base has no config.json. Mount one file")
    here = checkup(node(paths=looked), inputs=(bare,), address="inline", token=None)
    assert told(diagnose(here))[0] == [
        "n1: BASE /m/base has no config.json. Check the path and its permissions"
    ]


def test_what_lies_in_out_and_stops_other_merges_is_noted() -> None:
    finished = Problem("holds a finished merge, of plan 1f", "/m/out", "The same merge finds it.")

    assert told(diagnose(checkup(node(), notes=(finished,)))) == (
        [],
        ["/m/out: holds a finished merge, of plan 1f. The same merge finds it"],
    )


def test_what_stands_against_the_plan_is_a_problem(small: MergePlan) -> None:
    full = Problem("no space: the result takes 2 GB", "/m/out", "Free space there.")
    problems, notes = told(
        diagnose(checkup(node(), plan=replace(small, notes=("a note",)), refusals=(full,)))
    )

    assert problems == ["/m/out: no space: the result takes 2 GB. Free space there"]
    assert notes == ["plan: a note"]

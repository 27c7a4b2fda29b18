"""From what doctor finds to what it says: without Ray, files or GPUs."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from actors.examiner import DeviceView, Examination, ExaminedNode, GpuSight, PathSight, Silence
from actors.identity import Identity
from actors.libraries import Library
from cluster.diagnosis import Diagnosis, diagnose
from cluster.doctor import Checkup, Destination
from cluster.doctor_report import report_document, report_lines
from merge_core.errors import Problem
from merge_core.nvidia import Gpu, GpuProcess
from merge_core.plan import MergePlan
from merge_core.reachable import FileSight, InputSight
from merge_core.storage import FileIdentity

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
FOUND = Examination(identity=DRIVER, libraries=(), memory=10**11, gpus=(), view=CPU)
CONFIG = FileSight(
    identity=FileIdentity(name="config.json", size=2, mtime_ns=1), digest="of the content"
)
BASE = InputSight(path=Path("/m/base"), files=(CONFIG,), error=None)
LOOKED = PathSight(inputs=(BASE,), refusal=None)
LATE = Silence(reason="no answer within 9 s", kind="late")
TAKEN = Silence(reason="it was taken meanwhile", kind="waiting")
OUT = Destination(out=Path("/m/out"), place=Path("/m"), free=10**12)


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
        ({"identity": replace(DRIVER, raymeld="9", digest="x")}, "n1: has raymeld 9, the driver 1"),
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
            "n1: peft is 0.7.1, and should be >=0.20. A merge does without it",
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


def test_one_thing_on_many_nodes_is_one_problem_and_the_document_names_all() -> None:
    gone = replace(LOOKED, inputs=(replace(BASE, error="No such file or directory"),))
    found = checkup(*(node(f"n{n}", paths=gone) for n in range(5)))
    diagnosis = diagnose(found)

    ((said,), _) = told(diagnosis)
    assert said.startswith("n0, n1, n2 and 2 more: BASE /m/base cannot be read: No such file")
    (problem,) = report_document(found, diagnosis)["problems"]
    assert problem["places"] == ["n0", "n1", "n2", "n3", "n4"]


def test_a_gpu_that_ray_hands_out_and_that_is_too_full_is_a_problem(small: MergePlan) -> None:
    taker = GpuProcess(pid=4711, name="python3", used=80 << 30)
    full = replace(FULL, processes=(taker,))
    found = checkup(node(ray_gpus=2, gpus=(full, FREE), views=(GPU, GPU)), plan=small)

    (problem,), notes = told(diagnose(found))
    assert problem.startswith("n1, GPU 0: one lane needs 2 MB of memory and 2 MB of VRAM")
    assert "taken: 85,899 MB by python3 (process 4711)" in problem
    assert notes == []
    hidden = replace(CPU, visible="1")  # nothing is merged on a GPU that Ray was not given
    found = checkup(node(ray_gpus=1, gpus=(full, FREE), views=(GPU,), view=hidden), plan=small)
    assert diagnose(found).problems == ()


def test_a_gpu_that_is_full_of_other_actors_is_a_note_while_ray_does_not_hand_it_out(
    small: MergePlan,
) -> None:
    actor = GpuProcess(pid=4711, name="ray::Learner.learn", used=80 << 30)
    full = replace(FULL, processes=(actor,))
    taken = node(ray_gpus=2, taken=1, gpus=(full, FREE), views=(GPU,))

    problems, (_, note) = told(diagnose(checkup(taken, plan=small)))
    assert problems == []
    assert note.startswith("n1, GPU 0: one lane needs 2 MB of memory and 2 MB of VRAM")
    assert note.endswith("(process 4711). Ray hands it out when these actors have ended")
    both = replace(full, processes=(actor, replace(actor, name="python3")))
    for other in (replace(taken, taken=0), with_gpus(taken, both, FREE)):
        (problem,), _ = told(diagnose(checkup(other, plan=small)))
        assert problem.startswith("n1, GPU 0: one lane needs")


def with_gpus(one: ExaminedNode, *gpus: GpuSight) -> ExaminedNode:
    assert isinstance(one.examination, Examination)
    return replace(one, examination=replace(one.examination, gpus=gpus))


def test_where_ray_hides_all_gpus_from_who_was_given_none_they_count_as_handed_out(
    small: MergePlan,
) -> None:
    gpus = node(ray_gpus=2, gpus=(FULL, FREE), view=replace(CPU, visible=""))

    (problem,), notes = told(diagnose(checkup(gpus, plan=small)))
    assert problem.startswith("n1, GPU 0: one lane needs")
    assert notes == []


@pytest.mark.parametrize("changes", [{}, {"gpus": (FULL,), "view": replace(CPU, visible="MIG-1")}])
def test_where_nothing_tells_how_full_gpus_are_the_memory_of_the_machine_is_judged(
    small: MergePlan, changes: dict[str, Any]
) -> None:
    poor = node(ray_gpus=1, views=(GPU,), memory=10**6, **changes)

    (problem,), (note,) = told(diagnose(checkup(poor, plan=small)))
    assert problem.startswith("n1: one lane needs 2 MB of memory, found free: 1 MB of memory. Stop")
    assert note.endswith("is not known")


def test_too_little_memory_is_a_problem_where_the_cpu_would_merge(small: MergePlan) -> None:
    (problem,), _ = told(diagnose(checkup(node(memory=10**6), plan=small)))

    assert problem.startswith("n1: one lane needs 2 MB of memory, found free: 1 MB of memory. Stop")


def test_without_ray_a_gpu_that_torch_cannot_use_leaves_the_cpu() -> None:
    found = checkup(node(gpus=(FULL,)), address="inline", token=None)

    problems, (note,) = told(diagnose(found))
    assert problems == []
    assert note.startswith("n1: torch cannot use its 1 GPU: no CUDA here. A merge here runs on the")


def test_what_the_driver_cannot_read_or_write_is_said_of_the_driver() -> None:
    gone = replace(BASE, files=(), error="No such file or directory")
    refused = replace(OUT, refusal=Problem("Permission denied", "/m", "Check that."))
    problems, _ = told(diagnose(checkup(node(), inputs=(gone,), destination=refused)))

    assert [problem.split(". ")[0] for problem in problems] == [
        "the driver: BASE /m/base cannot be read: No such file or directory",
        "/m: OUT cannot be written: Permission denied",
    ]


def test_what_stands_against_the_plan_is_a_problem(small: MergePlan) -> None:
    full = Problem("no space: the result takes 2 GB", "/m/out", "Free space there.")
    problems, notes = told(
        diagnose(checkup(node(), plan=replace(small, notes=("a note",)), refusals=(full,)))
    )

    assert problems == ["/m/out: no space: the result takes 2 GB. Free space there"]
    assert notes == ["plan: a note"]


def test_the_report_has_a_row_a_node_and_the_problems_at_the_end(small: MergePlan) -> None:
    gone = replace(LOOKED, inputs=(replace(BASE, error="No such file or directory"),))
    hidden = replace(CPU, visible="")
    found = checkup(
        node("gpu-1", ray_gpus=2, gpus=(FULL, FREE), views=(GPU, replace(GPU, visible="1"))),
        node("n2", paths=gone, view=hidden, identity=replace(DRIVER, digest="x")),
        node("n3", examination=LATE, paths=None),
        node("n4", leaves_in=20.0, examination=None, paths=None),
        plan=small,
    )
    lines = report_lines(found, diagnose(found))

    assert lines[0] == "cluster   head:6379: 4 nodes, a token in use"
    rows = [" ".join(line.split()) for line in lines]
    assert rows[6:12] == [
        "node code CPUs memory free lanes BASE OUT",
        "gpu-1 same 4 100.00 GB 8 same writable",
        "n2 other 4 100.00 GB 8 unreadable writable",
        "n3 silent",
        "n4 leaves",
        "",
    ]
    assert "gpu-1 2 0, 1 all NVIDIA H100" in rows
    assert "gpu-1 0 H100 0.00 MB too full" in rows
    assert rows[-1] == "result 4 problems to solve"
    assert max(map(len, lines)) > 80  # no terminal: lines are not broken
    sliced = node(ray_gpus=7, gpus=(FULL,), view=replace(CPU, visible="MIG-1"))
    found = checkup(sliced, plan=small)
    rows = [" ".join(line.split()) for line in report_lines(found, diagnose(found))]
    assert "n1 0 H100 0.00 MB in slices" in rows
    assert report_document(found, diagnose(found))["nodes"][0]["gpus"][0]["hidden"] is False


def test_the_document_is_json_whatever_was_found(small: MergePlan) -> None:
    silent = node("n2", examination=LATE, paths=None)
    leaving = node("n3", leaves_in=math.inf, examination=None, paths=None)
    gpus = node("n1", ray_gpus=1, gpus=(FULL,), views=(GPU,))
    found = checkup(gpus, silent, leaving, plan=small)
    document = json.loads(json.dumps(report_document(found, diagnose(found)), allow_nan=False))

    assert document["ok"] is False
    assert document["nodes"][0]["gpus"][0]["lanes"] == 0
    assert document["nodes"][0]["inputs"] == [
        {"path": "/m/base", "files": 1, "error": None, "difference": None}
    ]
    assert (document["nodes"][1]["silence"], document["nodes"][2]["leaves_in"]) == (
        LATE.reason,
        None,
    )

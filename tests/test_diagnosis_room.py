"""What doctor says of devices that are full, or of which nothing tells how full they are."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from test_diagnosis import CPU, FREE, FULL, GPU, checkup, node, told

from actors.examiner import Examination, ExaminedNode, GpuSight
from cluster.diagnosis import diagnose
from merge_core.nvidia import GpuProcess
from merge_core.plan import MergePlan


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

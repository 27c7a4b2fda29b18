"""A checkup and its diagnosis as a person and as programs read them."""

from __future__ import annotations

import json
import math
from dataclasses import replace

from test_diagnosis import BASE, CPU, DRIVER, FREE, FULL, GPU, LATE, LOOKED, checkup, node, told

from cluster.diagnosis import diagnose
from cluster.doctor_report import report_document, report_lines
from merge_core.plan import MergePlan


def test_one_thing_on_many_nodes_is_one_problem_and_the_document_names_all() -> None:
    gone = replace(LOOKED, inputs=(replace(BASE, error="No such file or directory"),))
    found = checkup(*(node(f"n{n}", paths=gone) for n in range(5)))
    diagnosis = diagnose(found)

    ((said,), _) = told(diagnosis)
    assert said.startswith("n0, n1, n2 and 2 more: BASE /m/base cannot be read: No such file")
    (problem,) = report_document(found, diagnosis)["problems"]
    assert problem["places"] == ["n0", "n1", "n2", "n3", "n4"]


def test_the_report_has_a_row_a_node_and_the_problems_at_the_end(small: MergePlan) -> None:
    gone = replace(LOOKED, inputs=(replace(BASE, error="No such file or directory"),))
    hidden = replace(CPU, visible="")
    found = checkup(
        node("gpu-1", ray_gpus=2, gpus=(FULL, FREE), views=(GPU, replace(GPU, visible="1"))),
        node("n2", paths=gone, view=hidden, identity=replace(DRIVER, torch="2.8.0")),
        node("n5", examination=replace(DRIVER, digest="x"), paths=None),
        node("n3", examination=LATE, paths=None),
        node("n4", leaves_in=20.0, examination=None, paths=None),
        plan=small,
    )
    lines = report_lines(found, diagnose(found))

    assert lines[0] == "cluster   head:6379: 5 nodes, a token in use"
    rows = [" ".join(line.split()) for line in lines]
    assert rows[6:13] == [
        "node code CPUs memory free lanes BASE OUT",
        "gpu-1 same 4 100.00 GB 8 same writable",
        "n2 other 4 100.00 GB 8 unreadable writable",
        "n5 other",
        "n3 silent",
        "n4 leaves",
        "",
    ]
    assert "gpu-1 2 0, 1 all NVIDIA H100" in rows
    assert "gpu-1 0 H100 0.00 MB too full" in rows
    assert rows[-1] == "result 5 problems to solve"
    assert max(map(len, lines)) > 80  # no terminal: lines are not broken
    sliced = node(ray_gpus=7, gpus=(FULL,), view=replace(CPU, visible="MIG-1"))
    found = checkup(sliced, plan=small)
    rows = [" ".join(line.split()) for line in report_lines(found, diagnose(found))]
    assert "n1 0 H100 0.00 MB in slices" in rows
    assert report_document(found, diagnose(found))["nodes"][0]["gpus"][0]["hidden"] is False


def test_the_document_is_json_whatever_was_found(small: MergePlan) -> None:
    silent = node("n2", examination=LATE, paths=None)
    leaving = node("n3", leaves_in=math.inf, examination=None, paths=None)
    other = node("n4", examination=replace(DRIVER, raymeld="9"), paths=None)
    gpus = node("n1", ray_gpus=1, gpus=(FULL,), views=(GPU,))
    found = checkup(gpus, silent, leaving, other, plan=small)
    document = json.loads(json.dumps(report_document(found, diagnose(found)), allow_nan=False))

    assert document["ok"] is False
    assert document["nodes"][0]["gpus"][0]["lanes"] == 0
    assert document["nodes"][0]["inputs"] == [
        {"path": "/m/base", "files": 1, "error": None, "difference": None}
    ]
    assert document["nodes"][3]["difference"] == "has raymeld 9, the driver 1"
    assert (document["nodes"][1]["silence"], document["nodes"][2]["leaves_in"]) == (
        LATE.reason,
        None,
    )

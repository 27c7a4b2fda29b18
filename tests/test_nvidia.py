"""What is asked of NVIDIA's tool, and what is made of its answers, with a stand-in for the tool."""

from __future__ import annotations

from pathlib import Path

import pytest

from actors import examiner
from merge_core import nvidia
from merge_core.errors import DeviceMemoryError
from merge_core.memory import Memory, choose_lanes
from merge_core.nvidia import Gpu, GpuProcess, gpu_processes, list_gpus
from merge_core.plan import MergePlan

ANSWERS = {
    "--query-gpu=index,uuid,memory.free,name": (
        "0, GPU-1, 81037, NVIDIA H100 80GB HBM3\n1, GPU-2, [N/A], Broken\n"
    ),
    "--query-compute-apps=gpu_uuid,pid,used_memory,process_name": (
        "GPU-1, 4711, 70000, /usr/bin/python3\nGPU-2, 9, 1, c\nGPU-1, 815, [N/A], a, b\n"
        "No running processes found\n"
    ),
}


@pytest.fixture
def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in that knows ANSWERS, and fails when it is asked anything else."""
    cases = [
        f"'{asked} --format=csv,noheader,nounits') cat <<'END'\n{said}END\n;;"
        for asked, said in ANSWERS.items()
    ]
    script = tmp_path / "nvidia-smi"
    script.write_text("\n".join(["#!/bin/sh", 'case "$*" in', *cases, "*) exit 9;;", "esac", ""]))
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return script


def test_gpus_are_listed_with_their_free_memory(tool: Path) -> None:
    name = "NVIDIA H100 80GB HBM3"
    assert list_gpus() == [Gpu(index="0", uuid="GPU-1", name=name, free=81037 << 20)]


@pytest.mark.parametrize(
    ("visible", "seen"),
    [
        (None, True),
        ("2", True),
        ("0, 2", True),
        ("GPU-8932", True),
        ("", False),
        ("1", False),
        ("GPU-9", False),
        ("-1", False),
        ("MIG-1", False),
    ],
)
def test_cuda_visible_devices_hides_gpus_by_number_and_by_name(
    visible: str | None, seen: bool
) -> None:
    assert Gpu(index="2", uuid="GPU-8932f937", name="T4", free=1).is_visible(visible) is seen


def test_processes_are_named_even_where_the_driver_hides_what_they_take(tool: Path) -> None:
    assert gpu_processes() == {
        "GPU-1": [
            GpuProcess(pid=4711, name="/usr/bin/python3", used=70000 << 20),
            GpuProcess(pid=815, name="a, b", used=None),
        ],
        "GPU-2": [GpuProcess(pid=9, name="c", used=1 << 20)],
    }


def test_without_the_tool_nothing_is_known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))

    assert (list_gpus(), gpu_processes()) == ([], {})


def test_a_tool_that_fails_tells_nothing(tool: Path) -> None:
    tool.write_text("#!/bin/sh\nexit 9\n")

    assert (list_gpus(), gpu_processes()) == ([], {})


def test_who_takes_a_full_gpu_is_named(small: MergePlan, tool: Path) -> None:
    found = Memory(host=10**12, device=10**6, neighbours=tuple(gpu_processes()["GPU-1"]))

    with pytest.raises(DeviceMemoryError) as caught:
        choose_lanes(small, "cuda", found)

    assert caught.value.what.endswith(
        "found free: 1,000,000 MB of memory and 1 MB of VRAM;"
        " taken: 73,400 MB by /usr/bin/python3 (process 4711), VRAM by a, b (process 815)"
    )


def test_one_question_tells_of_all_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver that hangs costs its timeout once, and not once a GPU."""
    asked: list[tuple[str, ...]] = []

    def ask(*query: str, columns: int) -> list[list[str]]:
        asked.append(query)
        return [["GPU-7", "4711", "1", "python3"]] * (columns == 4)

    monkeypatch.setattr(nvidia, "_ask", ask)
    gpus = [Gpu(index=str(n), uuid=f"GPU-{n}", name="H100", free=1) for n in range(8)]
    monkeypatch.setattr(examiner, "list_gpus", lambda: gpus)

    *others, last = examiner._look_at_gpus()
    assert (len(others), len(last.processes), len(asked)) == (7, 1, 1)

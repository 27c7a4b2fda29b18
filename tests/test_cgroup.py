"""The memory that the cgroups of a process leave it."""

from __future__ import annotations

from pathlib import Path

import pytest

from merge_core import cgroup
from merge_core.cgroup import free_in_cgroups


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(cgroup, "ROOT", tmp_path / "cgroup")
    monkeypatch.setattr(cgroup, "MEMBERSHIP", tmp_path / "membership")
    return tmp_path / "cgroup"


def member_of(root: Path, *lines: str) -> None:
    (root.parent / "membership").write_text("".join(f"{line}\n" for line in lines))


def write_group(group: Path, limit: str, used: int, cache: int = 0) -> None:
    group.mkdir(parents=True, exist_ok=True)
    (group / "memory.max").write_text(f"{limit}\n")
    (group / "memory.current").write_text(f"{used}\n")
    stat = f"anon 7\nfile {cache}\ninactive_file {cache - cache // 3}\nactive_file {cache // 3}\n"
    (group / "memory.stat").write_text(stat)


def test_page_cache_counts_as_free(root: Path) -> None:
    """A container that has just copied a checkpoint is full of it, up to its limit."""
    member_of(root, "0::/")
    write_group(root, "4000", used=3999, cache=3000)

    assert free_in_cgroups() == 4000 - 999


def test_the_tightest_limit_above_the_process_holds(root: Path) -> None:
    member_of(root, "0::/slurm/job_7/step_0")
    write_group(root / "slurm", "9000", used=5000)
    write_group(root / "slurm" / "job_7", "3000", used=1000, cache=300)
    write_group(root / "slurm" / "job_7" / "step_0", "max", used=900)

    assert free_in_cgroups() == 3000 - 700


def test_the_first_version_of_cgroups_is_read_too(root: Path) -> None:
    member_of(root, "12:cpu,cpuacct:/job", "9:memory:/job", "0::/")
    group = root / "memory" / "job"
    group.mkdir(parents=True)
    (group / "memory.limit_in_bytes").write_text("5000\n")
    (group / "memory.usage_in_bytes").write_text("4500\n")
    (group / "memory.stat").write_text("total_inactive_file 900\ntotal_active_file 100\ncache 9\n")

    assert free_in_cgroups() == 5000 - 3500


def test_a_group_over_its_limit_leaves_nothing(root: Path) -> None:
    member_of(root, "0::/")
    write_group(root, "4000", used=4100)

    assert free_in_cgroups() == 0


@pytest.mark.parametrize("lines", [(), ("0::/",), ("0::/gone/away",)])
def test_without_a_limit_there_is_no_answer(root: Path, lines: tuple[str, ...]) -> None:
    member_of(root, *lines)

    assert free_in_cgroups() is None


def test_a_system_without_cgroups_has_no_limit(root: Path) -> None:
    assert not root.exists()
    assert free_in_cgroups() is None

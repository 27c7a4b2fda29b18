"""The wheel that a job takes along: what pip makes of it, and the name that Ray goes by."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from actors.identity import PACKAGES
from cluster.wheel import PYTHON, assemble_wheel

ROOT = Path(__file__).resolve().parent.parent


def run(*command: object, **environment: str) -> str:
    done = subprocess.run(
        list(map(str, command)),
        env={**os.environ, **environment},
        cwd="/",
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def assembled_by(packages: Path, directory: Path) -> Path:
    """The wheel that the raymeld in ``packages`` makes of itself."""
    directory.mkdir()
    code = (
        "import pathlib, sys, cluster.wheel; "
        "print(cluster.wheel.assemble_wheel(pathlib.Path(sys.argv[1])))"
    )
    return Path(run(sys.executable, "-P", "-c", code, directory, PYTHONPATH=str(packages)))


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the packages, with what lies about in a checkout, and younger files."""
    where = tmp_path / "checkout"
    for package in PACKAGES:
        shutil.copytree(ROOT / package, where / package, copy_function=shutil.copyfile)
    (where / "cluster" / ".cli.py.swp").write_bytes(b"an editor's")
    return where


def test_an_installed_raymeld_makes_the_wheel_that_it_came_in(tmp_path: Path) -> None:
    wheel = assemble_wheel(tmp_path)
    target = tmp_path / "installed"
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--target", target)

    run(*pip, wheel)

    again = assembled_by(target, tmp_path / "again")
    assert again.name == wheel.name
    assert again.read_bytes() == wheel.read_bytes()


def test_the_wheel_of_the_same_files_is_the_same_wherever_they_lie(
    checkout: Path, tmp_path: Path
) -> None:
    here = assemble_wheel(tmp_path)
    there = assembled_by(checkout, tmp_path / "there")
    assert (there.name, there.read_bytes()) == (here.name, here.read_bytes())


def test_a_changed_file_changes_the_name_for_ray_knows_wheels_by_their_names(
    checkout: Path, tmp_path: Path
) -> None:
    with (checkout / "merge_core" / "kernel.py").open("a") as file:
        file.write("# another\n")
    assert assembled_by(checkout, tmp_path / "there").name != assemble_wheel(tmp_path).name


def test_the_wheel_holds_the_packages_and_asks_for_nothing_else(tmp_path: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    with zipfile.ZipFile(assemble_wheel(tmp_path)) as wheel:
        names = wheel.namelist()
        metadata = wheel.read(next(n for n in names if n.endswith("/METADATA"))).decode()
        assert wheel.testzip() is None
    assert {name.split("/")[0] for name in names} == {*PACKAGES, names[-1].split("/")[0]}
    assert "merge_core/verify/structure.py" in names
    assert "cluster/py.typed" in names
    assert not [name for name in names if "__pycache__" in name or "/." in name]
    assert "Requires-Dist" not in metadata  # pip would bring torch to every node
    assert f"Requires-Python: {PYTHON}\n" in metadata
    assert project["requires-python"] == PYTHON

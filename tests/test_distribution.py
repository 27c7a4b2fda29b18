"""What is published: source and wheel whole, as a package index takes them, and CI."""

from __future__ import annotations

import email.message
import email.parser
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.demo import LESSONS

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REPOSITORY = PROJECT["urls"]["Repository"]
WORKFLOW: dict[Any, Any] = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())


def files() -> set[str]:
    """All of the repository, as git has them, or else as they lie there."""
    git = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(git, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git repository")
    return {name for name in done.stdout.splitlines() if (ROOT / name).exists()}


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the source distribution and the wheel that is made of it."""
    path = tmp_path_factory.mktemp("published")
    for name in files():
        (path / "checkout" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, path / "checkout" / name)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", path / "dist"]
    done = subprocess.run([*command, path / "checkout"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Package would be ignored" not in done.stdout + done.stderr
    return path / "dist"


def metadata(published: Path) -> email.message.Message:
    (wheel,) = published.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        return email.parser.Parser().parsestr(archive.read(name).decode())


def test_a_package_index_takes_both(published: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "twine", "check", "--strict", *published.iterdir()],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("PASSED") == 2


def test_the_source_is_whole(published: Path) -> None:
    (source,) = published.glob("*.tar.gz")
    with tarfile.open(source) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    assert files() - held == set()


def test_the_wheel_has_everything_that_the_packages_have(published: Path) -> None:
    (wheel,) = published.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
        licences = {Path(n).name for n in archive.namelist() if ".dist-info/licenses/" in n}
    packages = ("merge_core/", "actors/", "cluster/")
    assert held == {name for name in files() if name.startswith(packages)}
    assert licences == {"LICENSE", "echarts.LICENSE", "echarts.LICENSE-d3"}


def test_the_wheel_alone_runs_the_demo_beside_a_users_packages_of_the_same_names(
    published: Path, tmp_path: Path
) -> None:
    """In an environment that has what raymeld asks for, and no raymeld but this."""
    (wheel,) = published.glob("*.whl")
    place, mine = tmp_path / "environment", tmp_path / "mine"
    venv.create(place, symlinks=True)
    python = place / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-index"]
    subprocess.run([*pip, "--no-deps", wheel], check=True)
    (own,) = place.glob("lib/*/site-packages")
    (own / "others.pth").write_text(sysconfig.get_path("purelib"))  # behind its own
    for name in ("cluster", "actors"):
        (mine / name).mkdir(parents=True)
        (mine / name / "__init__.py").write_text("raise RuntimeError('not ours')")

    kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "PYTHON"))}
    environment = {**kept, "HOME": str(tmp_path)}
    done = subprocess.run(
        [place / "bin" / "raymeld", "demo"],
        cwd=mine,
        env=environment,
        capture_output=True,
        text=True,
    )

    assert done.returncode == 0, done.stderr
    said = [line.split(maxsplit=1) for line in done.stdout.splitlines()]
    answers = [line[1] for line in said if line[:1] == ["merged"] and line[1].startswith("'")]
    assert [answer.strip("' ") for answer in answers] == [*map(str.strip, LESSONS.values())]
    assert done.stdout.endswith("done: the merged checkpoint is in demo-merge/merged\n")
    run = json.loads(next(mine.glob("demo-merge/merged/.raymeld/runs/*.json")).read_text())
    assert run["options"]["address"] == "local"
    where = [python, "-P", "-c", "import cluster, actors, merge_core; print(cluster.__file__)"]
    found = subprocess.run(where, cwd=mine, env=environment, capture_output=True, text=True)
    assert Path(found.stdout.strip()).is_relative_to(own)


def test_the_readme_of_the_package_leads_to_the_repository(published: Path) -> None:
    found = metadata(published)
    text = str(found.get_payload())
    assert found["License-Expression"] == "Apache-2.0"
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert len(links) > 20
    assert [link for link in links if not link.startswith("https://")] == []
    for link in links:
        if link.startswith(REPOSITORY):
            name = re.sub(r"^/(blob|raw)/main/", "", link.removeprefix(REPOSITORY))
            assert (ROOT / name.partition("#")[0]).exists(), link


def test_the_repository_is_called_the_same_everywhere() -> None:
    assert f"repository: {REPOSITORY}\n" in (ROOT / "mkdocs.yml").read_text()
    assert all(url.startswith(REPOSITORY) for url in PROJECT["urls"].values())


def test_the_licence_is_that_of_the_authors() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text
    assert re.search(r"Copyright \d{4} the raymeld authors", text)
    assert PROJECT["authors"] == [{"name": "the raymeld authors"}]


def test_ci_may_read_and_nothing_else_and_names_the_version_of_each_action() -> None:
    assert WORKFLOW["permissions"] == {"contents": "read"}
    for name, job in WORKFLOW["jobs"].items():
        assert "permissions" not in job, name
        assert job["timeout-minutes"]
        assert re.fullmatch(r"ubuntu-\d\d\.\d\d", job["runs-on"])
        for step in job["steps"]:
            if "uses" in step:
                assert re.fullmatch(r"actions/[\w-]+@v\d+(\.\d+)*", step["uses"])
            if step.get("uses", "").startswith("actions/checkout"):
                assert step["with"]["persist-credentials"] is False


def test_ci_does_what_a_person_does() -> None:
    runs = [
        step["run"] for job in WORKFLOW["jobs"].values() for step in job["steps"] if "run" in step
    ]
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    called = {run.split()[1] for run in runs if run.startswith("make ")}
    assert called == {"setup", "check", "test"}
    assert called <= targets
    tested = WORKFLOW["jobs"]["ci"]["strategy"]["matrix"]["python"]
    for version in tested:
        assert f"Programming Language :: Python :: {version}" in PROJECT["classifiers"]


def test_the_five_tasks_of_contributing_are_there() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    named = re.findall(r"^\| [\w-]+ \| `make (\w+)", text, re.MULTILINE)
    assert named == ["setup", "lint", "test", "bench", "check"]

"""The documentation as a site: built without a complaint, and asking nobody for anything."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def build(checkout: Path, site: Path) -> subprocess.CompletedProcess[str]:
    # Without --quiet, which makes warnings no errors although mkdocs.yml is strict.
    command = [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(site)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("site") / "site"
    done = build(ROOT, path)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    return path


def test_nothing_is_fetched_from_elsewhere(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 20
    for page in pages:
        text = page.read_text()
        loaded = re.findall(r"<(?:script|img|iframe)[^>]+src=\"?([^\" >]+)", text)
        loaded += re.findall(r"<link[^>]+rel=\"?(?:stylesheet|icon|preconnect)[^>]+", text)
        assert loaded
        assert [place for place in loaded if "//" in place] == [], page


def test_the_reference_shows_signatures_and_docstrings(site: Path) -> None:
    text = re.sub(r"<[^>]+>", "", (site / "library" / "index.html").read_text())
    for said in ("make_plan", "shard_bytes", "merge_on_ray", "NonFiniteError", "VerifyReport"):
        assert said in text
    assert ":::" not in text


def test_a_page_says_in_which_language_it_is(site: Path) -> None:
    said = {name: (site / name / "index.html").read_text() for name in ("", "zh", "adapters")}
    found = {name: re.findall(r"<html lang=\"?([\w-]+)", text) for name, text in said.items()}
    assert found == {"": ["en"], "zh": ["zh-Hans"], "adapters": ["en"]}


def test_links_that_leave_the_documentation_lead_to_the_repository(site: Path) -> None:
    text = (site / "scale" / "index.html").read_text()
    assert re.search(
        r"href=\"https://[^\"]+/blob/main/benchmarks/results/core-speed[^\"]+md\"", text
    )


def test_links_that_lead_nowhere_end_the_build(tmp_path: Path) -> None:
    checkout = tmp_path / "checkout"
    (checkout / "docs").mkdir(parents=True)
    shutil.copytree(ROOT / "docs" / "hooks", checkout / "docs" / "hooks")
    settings = (ROOT / "mkdocs.yml").read_text()
    settings = re.sub(r"\nnav:.*?\n\n", "\n", settings, flags=re.DOTALL)
    (checkout / "mkdocs.yml").write_text(re.sub(r"  - mkdocstrings:\n(?:    .*\n)+", "", settings))
    links = ("index.md#here", "../mkdocs.yml", "#nowhere", "other.md", "../other.md")
    shown = "".join(f"[there]({link})\n" for link in links)
    (checkout / "docs" / "index.md").write_text(f"# Here\n\n{shown}")

    done = build(checkout, tmp_path / "site")

    assert done.returncode == 1
    warnings = [line for line in done.stderr.splitlines() if line.startswith("WARNING")]
    assert len(warnings) == 3
    for link in links[2:]:
        assert any(link in warning for warning in warnings)

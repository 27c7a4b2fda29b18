"""What README and documentation show: every command runs here, or would be taken by its program."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from cluster_files import call_problems
from handmade import Geometry, random_factors, random_tensors, write_adapter, write_base
from packers import Gptq, write_quantised
from pages import NAMES, PAGES, ROOT, SESSION, SHELL, blocks_of, spans_of
from shell_words import problems_of
from typer.testing import CliRunner

from cluster.cli import app
from merge_core.verify import verify

MODELS = {"Qwen1.5-7B": 32, "Qwen1.5-14B": 32, "Qwen1.5-72B": 80, "Qwen1.5-110B": 80}
"""Layers of each; the rest of them is tiny."""
ADAPTERS = ("my-lora", "other-lora", "a", "b")
MOUNT = "/mnt/models"
"""Where the pages about clusters have their models."""
RUN = ("plan", "merge", "verify", "status", "report", "doctor")
"""Commands that run here, unless they need a cluster or a GPU. The demo has a test of its own."""

PACKED = "Qwen1.5-7B-Chat-GPTQ-Int4"
page = pytest.mark.parametrize("page", PAGES, ids=NAMES)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that a page takes for given, in one directory."""
    path = tmp_path_factory.mktemp("models")
    for name, layers in MODELS.items():
        shape = Geometry(layers=layers)
        write_base(path / name, random_tensors(shape), shape.config, files=2)
    linear = Geometry(layers=32).linear
    for seed, name in enumerate(ADAPTERS):
        factors = random_factors(linear, dict.fromkeys(linear, 2), seed=seed)
        write_adapter(path / name, factors, r=2, lora_alpha=4, base_model_name_or_path="Qwen1.5-7B")
    packed = Geometry(hidden=64, inner=64, layers=1)
    write_quantised(path / PACKED, Gptq(), packed)
    small = random_factors(packed.linear, dict.fromkeys(packed.linear, 2))
    write_adapter(path / "for-packed", small, r=2, lora_alpha=4)
    pins = {"model.embed_tokens": "cpu", "model.layers": "cpu"}
    (path / "pins.json").write_text(json.dumps(pins))
    return path


@pytest.fixture
def place(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The directory in which somebody follows a page."""
    for path in models.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "recipe.yaml").write_text(blocks_of(ROOT / "docs/recipes.md")[0].text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_ADDRESS", "inline")  # starting Ray has tests of its own
    yield tmp_path
    shutil.rmtree(tmp_path, ignore_errors=True)


def runs_here(command: str) -> bool:
    """Whether it is a raymeld that needs no cluster, no GPU and no store."""
    words = command.split()
    return (
        words[0] == "raymeld"
        and words[1] in RUN
        and (MOUNT not in command or words[1] == "plan")
        and ("--address" not in words or "inline" in words)
        and "://" not in command
        and not (words[1] == "merge" and "--device cuda" in command)
    )


def run(command: str, place: Path, before: set[str]) -> None:
    """Run it in ``place``, as somebody would who has not tried the other merges of the page."""
    command = command.replace(MOUNT, str(place))
    words = shlex.split(command, comments=True)[1:]
    if PACKED in words:
        words = [word.replace("my-lora", "for-packed") for word in words]
    out = place / "merged"
    if words[0] == "merge" and {"merged", "recipe.yaml"} & {*words} and command not in before:
        shutil.rmtree(out, ignore_errors=True)
    if words[0] in ("verify", "status", "report") and not out.exists():
        invoke("merge", "Qwen1.5-7B", "my-lora", "--out", "merged")
    before.add(command)
    invoke(*words)


def invoke(*words: str) -> None:
    done = CliRunner().invoke(app, words, catch_exceptions=False)
    assert done.exit_code == 0, f"raymeld {shlex.join(words)}\n{done.output}"


@page
def test_every_command_runs_or_would_be_taken(page: Path, place: Path) -> None:
    before: set[str] = set()
    for block in blocks_of(page):
        assert block.hidden_commands == []
        for command in block.commands:
            assert problems_of(command) == [], command
            if runs_here(command):
                run(command, place, before)


@page
def test_every_block_says_what_it_is_and_reads_as_that(page: Path) -> None:
    for block in blocks_of(page):
        assert block.language in ("", SHELL, SESSION, "python", "json", "yaml"), block
        if block.language == "json":
            for text in [block.text] if block.text.startswith("{\n") else block.text.splitlines():
                json.loads(text)
        elif block.language == "yaml":
            yaml.safe_load(block.text)
        elif block.language == "python":
            compile(block.text, str(page), "exec")


@page
def test_items_of_a_list_are_items_on_the_site_too(page: Path) -> None:
    """There, one that follows an indented line goes on with its paragraph."""
    assert re.findall(r"^    [^\n]+\n\d+\. .*", page.read_text(), re.MULTILINE) == []


@page
def test_commands_in_running_text_exist(page: Path) -> None:
    for span in spans_of(page):
        if span.startswith("raymeld "):
            assert span_problems(span) == [], span


def span_problems(span: str) -> list[str]:
    """Of a command that may be shortened: does it exist, and do its options?"""
    if span.startswith("raymeld submit") and " -- " not in span:
        span += " -- merge a b --out c"
    shortened = r"Missing|NoArgsIsHelp|requires an argument|not one of"
    return [p for p in call_problems(span) if not re.search(shortened, p)]


@pytest.mark.parametrize(
    "name", ["README.md", "README.zh-CN.md", "docs/library.md"], ids=lambda name: name
)
def test_the_library_works_as_shown(name: str, place: Path) -> None:
    shown = [block for block in blocks_of(ROOT / name) if block.language == "python"]
    assert shown
    scope: dict[str, object] = {}
    for block in shown:
        if "merge_on_ray" not in block.text:
            exec(block.text, scope)
    assert verify(place / "merged", "digest").ok


def test_the_chinese_pages_show_the_commands_and_figures_of_the_english_ones() -> None:
    for english, chinese in (
        ("README.md", "README.zh-CN.md"),
        ("docs/index.md", "docs/zh/index.md"),
    ):
        commands = [
            [shlex.split(c, comments=True) for b in blocks_of(ROOT / name) for c in b.commands]
            for name in (english, chinese)
        ]
        assert commands[0] == commands[1]
    figures = [
        re.findall(r"\| ([\d.]+ \| [\d.]+ \|[^|]*)\|", (ROOT / name).read_text())
        for name in ("README.md", "README.zh-CN.md")
    ]
    assert len(figures[0]) == 6
    assert figures[0] == figures[1]


def test_words_that_no_program_takes_are_found() -> None:
    for wrong in (
        "raymeld merge a b --outt c",
        "raymeld mreg a b",
        "raymeld merge a b --out c --gpus 3",
        "raymeld submit --address x -- merge a b --outt c",
        "ray upp ray_cluster.yaml",
        "ray exec ray_cluster.yaml 'raymeld plan a --out'",
        "kubectl exec x -- raymeld doctor --adress y",
        "kubectl get x --wach",
        "kubectl delete x",
        "docker build --tags x .",
        "ray up missing.yaml",
        "aws ec2 describe-images --owner amazon",
        "aws ec2 describe-image",
        "pip install --constraints x .",
        "hf download a/b --local-dirs c",
        "make chekc",
        "export A=$(kubectl gte secret raymeld | base64 --decode)",
    ):
        assert problems_of(wrong), wrong


def test_the_messages_in_the_troubleshooting_are_ours() -> None:
    said = "".join(
        re.sub(r"\"\s*\n\s*f?\"", "", path.read_text())  # texts over several lines
        for folder in ("merge_core", "actors", "cluster")
        for path in (ROOT / folder).rglob("*.py")
    )
    table = (ROOT / "docs" / "troubleshooting.md").read_text().partition("## What raymeld says")[2]
    messages = re.findall(r"^\|([^|]*`[^|]*)\|", table, re.MULTILINE)
    assert len(messages) > 10
    quoted = [text for message in messages for text in re.findall(r"`([^`]+)`", message)]
    assert [text for text in quoted if text not in said] == []

"""The command line before it does anything: help, typos, completion, colours."""

from __future__ import annotations

import inspect
import os
import pty
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import typer
from cluster_files import call_problems
from typer.testing import CliRunner

from cluster.cli import app
from cluster.help_screen import TALK
from cluster.options import Device, Dtype, Level
from merge_core import __version__
from merge_core.updates.combined import SignMethod

SCREEN = 46
"""Lines that a merge's thirty-odd options may take; a window of 80 columns has that many, or does
at the second look."""


def commands() -> Iterator[tuple[str, Any]]:
    """Every command by its words, without those that hold others."""
    root: Any = typer.main.get_command(app)
    for name, command in root.commands.items():
        inner = getattr(command, "commands", None)
        if inner is None:
            yield name, command
        else:
            yield from ((f"{name} {word}", one) for word, one in inner.items())


COMMANDS = dict(commands())
every = pytest.mark.parametrize("words", ["", "jobs", *COMMANDS])


def shown(*words: str, columns: int = 80) -> str:
    done = CliRunner().invoke(app, words, prog_name="raymeld", terminal_width=columns - 2)
    return done.output


@every
def test_help_fits_a_screen(words: str) -> None:
    lines = shown(*words.split(), "--help").splitlines()

    assert len(lines) <= SCREEN
    assert max(map(len, lines)) <= 80
    assert not [line for line in lines if line.endswith("...") and "COMMAND" not in line]


@every
def test_help_is_there_for_who_asks_shortly(words: str) -> None:
    assert shown(*words.split(), "-h") == shown(*words.split(), "--help")


@every
def test_help_is_there_on_a_narrow_terminal_too(words: str) -> None:
    wide, narrow = (shown(*words.split(), "--help", columns=n) for n in (80, 50))

    examples = [line.strip() for line in wide.splitlines() if line.startswith("  raymeld ")]
    assert "".join(narrow.split()) == "".join(wide.split())
    lines = [line for line in narrow.splitlines() if line.strip() not in examples]
    assert max(map(len, lines)) <= 60


def test_the_version_is_told() -> None:
    done = CliRunner().invoke(app, ["--version"])
    assert (done.exit_code, done.stdout) == (0, f"raymeld {__version__}\n")
    assert "Fold PEFT LoRA adapters" in shown("--help")


@pytest.mark.parametrize("words", COMMANDS)
def test_examples_are_right(words: str) -> None:
    examples = [
        line.strip()
        for line in inspect.cleandoc(COMMANDS[words].help).splitlines()
        if line.strip().startswith("raymeld ")
    ]
    assert call_problems("\n".join(examples)) == []
    assert examples or words in ("jobs list", "jobs status", "jobs stop")


def test_the_page_about_the_command_line_has_every_command() -> None:
    page = (Path(__file__).parent.parent / "docs" / "command-line.md").read_text()
    table = page.partition("| command |")[2].partition("\n\n")[0]
    first = [cell for line in table.splitlines() for cell in line.split("|")[1:2]]
    named = {name for cell in first for name in cell.replace("`", "").replace(",", " ").split()}
    assert named - {"---"} == {words.split()[0] for words in COMMANDS}


def test_an_option_is_described_in_the_same_words_everywhere() -> None:
    words: dict[str, set[tuple[str, str]]] = defaultdict(set)
    for name, command in COMMANDS.items():
        for param in command.params:
            if param.param_type_name == "option" and not param.hidden:
                assert param.help, f"{name} {param.opts}"
                assert param.is_flag or param.metavar, f"{name} {param.opts}: what does it take"
                words[param.opts[0]].add((param.metavar, getattr(param, "rich_help_panel", None)))
    assert {group for _, group in words["--json"]} == {TALK}
    kinds = {option: {metavar for metavar, _ in said} for option, said in words.items()}
    assert {option: said for option, said in kinds.items() if len(said) > 1} == {
        "--address": {"ADDRESS", "URL"}  # of Ray itself, and of its dashboard
    }


@pytest.mark.parametrize(
    ("option", "choices"),
    [
        ("--verify", Level),
        ("--device", Device),
        ("--dtype", Dtype),
        ("--majority-sign", get_args(SignMethod)),
    ],
)
def test_every_choice_is_named(option: str, choices: Any) -> None:
    (param,) = [p for p in COMMANDS["merge"].params if option in p.opts]
    assert [one for one in map(str, choices) if one not in param.help] == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("merge a b --otu c", "No such option '--otu'. Did you mean '--out'?"),
        ("merge a b --out c --verfy load", "No such option '--verfy'. Did you mean '--verify'?"),
        ("mreg a b", "No such command 'mreg'. Did you mean 'merge'?"),
        ("jobs lst", "No such command 'lst'. Did you mean 'list'?"),
        ("jobs list --adress x", "No such option '--adress'. Did you mean '--address'?"),
        ("--hlep", "No such option '--hlep'. Did you mean '--help'?"),
        ("plan a b --dtype bf16", "Invalid value for '--dtype': 'bf16' is not one of 'bfloat16'"),
        ("merge a b --out c --combine tie", "'magnitude_prune_svd'. Did you mean 'ties'?"),
        ("merge a b --out c --verify Digset", "'load'. Did you mean 'digest'?"),
        ("merge a b --out c --device tpu9", "'auto', 'cuda', 'cpu'."),
        ("submit -- merge a b --layer c", "No such option '--layer'. Did you mean '--layers'?"),
    ],
)
def test_a_typo_is_told_what_was_meant(words: str, said: str) -> None:
    done = CliRunner().invoke(app, words.split())

    assert done.exit_code == 2
    assert said in done.output
    assert "pydantic" not in done.output


def in_bash(script: str, home: Path) -> str:
    binaries = str(Path(sys.executable).parent)
    environment = {"PATH": f"{binaries}:{os.environ['PATH']}", "HOME": str(home)}
    done = subprocess.run(
        ["bash", "-ec", script], env=environment, cwd=home, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_bash_completes_commands_options_and_values(tmp_path: Path) -> None:
    typed = [("me", 1), ("merge --verif", 2), ("merge --verify n", 3), ("jobs l", 2)]
    calls = "\n".join(
        f"COMP_WORDS=(raymeld {words}); COMP_CWORD={n};"
        ' _raymeld_completion raymeld || true; echo "${COMPREPLY[*]}"'
        for words, n in typed
    )
    said = in_bash(f'eval "$(raymeld --show-completion bash)"\n{calls}', tmp_path)

    assert said.splitlines() == ["merge", "--verify", "numeric", "list logs"]


@pytest.mark.parametrize("colourless", [False, True])
def test_colours_are_for_terminals_and_not_for_those_who_want_none(
    colourless: bool, tmp_path: Path
) -> None:
    kept = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR")}
    wish = {"NO_COLOR": "1"} if colourless else {}
    ours, theirs = pty.openpty()
    command = [Path(sys.executable).with_name("raymeld"), "status", "nothing-here"]
    process = subprocess.Popen(
        command, env={**kept, **wish, "TERM": "xterm"}, cwd=tmp_path, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    said = b""
    while piece := _read(ours):
        said += piece
    os.close(ours)

    assert process.wait(timeout=60) == 2
    assert b"there is no merge" in said
    assert (b"\x1b[1;31m" in said) == (not colourless)
    assert (b";31m" in said) == (not colourless)


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65536)
    except OSError:  # Linux ends a pseudo-terminal with EIO
        return b""

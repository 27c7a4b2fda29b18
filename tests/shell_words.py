"""Commands of the pages that cannot run here: would the programs that they call take the words?

raymeld, Ray, pip, hf, make and the AWS CLI are asked, or what they are made from. The others are no
Python packages: of these there is a table of what was looked up in their manuals, so that a command
that is not in it fails until somebody has looked.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

from cluster_files import ROOT, call_problems

LOOKED_UP = {
    "docker build": "--tag --build-arg",
    "docker push": "",
    "gcloud compute": "--project --filter --format",
    "gcloud auth": "",
    "helm install": "--version",
    "helm repo": "",
    "kubectl apply": "-f",
    "kubectl exec": "",
    "kubectl get": "--watch --output",
    "kubectl logs": "--follow --selector",
    "kubectl port-forward": "",
    "sbatch examples/clusters/slurm.sh": "",
    "base64 --decode": "",
}
"""Of each program and what it is to do, the options that it is given here."""

_SHELL = {".", "export"}
_THEIRS = {"recipe.yaml"}
"""Files that whoever reads the page has made."""


def problems_of(command: str) -> list[str]:
    """What is wrong with one line of shell."""
    found = call_problems(command)
    found += _missing_files(command)
    for simple in _simple_commands(command):
        found += _problems_of_simple(simple)
    return found


def _simple_commands(command: str) -> list[list[str]]:
    """The parts of pipes, substitutions and lists, each without variables that are set for it."""
    checked = subprocess.run(["bash", "-n", "-c", command], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr
    text = re.sub(r"^export \w+=", "", command)
    parts = re.split(r"\$\(|\)$|\s\|\s|\s&&\s", text)
    words = [shlex.split(part, comments=True) for part in parts]
    return [_without_variables(part) for part in words if part]


def _without_variables(words: list[str]) -> list[str]:
    while words and re.fullmatch(r"\w+=.*", words[0]):
        words = words[1:]
    return words


def _problems_of_simple(words: list[str]) -> list[str]:
    program, *rest = words
    name = Path(program).name
    if name in ("raymeld", "ray") or program in _SHELL:
        return []  # see call_problems
    asked = {"pip": _ask_pip, "hf": _ask_hf, "make": _ask_make, "aws": _ask_aws}
    if name in asked:
        return asked[name](rest)
    if name.startswith("python"):
        return [] if rest[:2] == ["-m", "venv"] or (ROOT / rest[0]).exists() else [str(words)]
    return _look_up(words)


def _look_up(words: list[str]) -> list[str]:
    known = LOOKED_UP.get(" ".join(words[:2]))
    if known is None:
        return [f"nobody has looked up {shlex.join(words)}"]
    own = words[: words.index("--")] if "--" in words else words
    given = {word.partition("=")[0] for word in own[2:] if re.match(r"--?[a-z]", word)}
    return [f"{words[0]} has no {option}" for option in sorted(given - set(known.split()))]


def _ask_pip(words: list[str]) -> list[str]:
    """By a process of its own: once imported, pip keeps setuptools out of the one it is in."""
    command = [sys.executable, "-m", "pip", *words, "--help"]  # what does not exist comes first
    done = subprocess.run(command, capture_output=True, text=True)
    return [f"pip: {done.stderr}"] if done.returncode else []


def _ask_hf(words: list[str]) -> list[str]:
    from click.testing import CliRunner
    from huggingface_hub.cli.hf import app

    done = CliRunner().invoke(app, [*words, "--help"])  # options that do not exist come first
    return [f"hf: {done.output}"] if done.exit_code else []


def _ask_make(words: list[str]) -> list[str]:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    asked = [word for word in words if "=" not in word]
    return [f"make has no {target}" for target in asked if target not in targets]


def _ask_aws(words: list[str]) -> list[str]:
    """The AWS CLI is made of the same descriptions as botocore."""
    import botocore.session
    from botocore import xform_name

    service, operation, *rest = words
    model = botocore.session.get_session().get_service_model(service)
    names = {xform_name(name, "-"): name for name in model.operation_names}
    if operation not in names:
        return [f"aws {service} has no {operation}"]
    members = model.operation_model(names[operation]).input_shape.members
    known = {"--region", "--query", "--output", *(f"--{xform_name(m, '-')}" for m in members)}
    return [f"aws {operation} has no {w}" for w in rest if w.startswith("--") and w not in known]


def _missing_files(command: str) -> list[str]:
    """Files of the repository that a command names."""
    named = re.findall(r"(?<![\w/.-])[\w./-]+\.(?:yaml|sh|lock|py)\b", command)
    missing = [name for name in named if name not in _THEIRS and not (ROOT / name).exists()]
    return [f"there is no {name}" for name in missing]

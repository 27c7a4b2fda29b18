"""The files that describe clusters, and everything that can be found wrong with them offline."""

from __future__ import annotations

import copy
import functools
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import kubernetes_schema
import typer
import yaml
from node_configs import aws_problems, gcp_problems

from cluster.cli import app

ROOT = Path(__file__).resolve().parent.parent
CLUSTERS = ROOT / "examples" / "clusters"
AWS = ROOT / "ray_cluster.yaml"
GCP = CLUSTERS / "gcp.yaml"
ON_PREMISES = CLUSTERS / "on_premises.yaml"
RAY_JOB = CLUSTERS / "kuberay_rayjob.yaml"
RAY_CLUSTER = CLUSTERS / "kuberay_raycluster.yaml"
SLURM = CLUSTERS / "slurm.sh"
DOCKERFILE = ROOT / "Dockerfile"
NODE_CONFIGS = {"aws": aws_problems, "gcp": gcp_problems}
TOKEN = "~/.ray/auth_token"
DRAIN = "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"
DRAIN_MARGIN = 10
"""Seconds between the end of a drain and that of its pod, for Ray's processes to end."""


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def tool(name: str, *words: object, text: str = "") -> list[str]:
    """What a linter of the virtual environment says, a line each."""
    command = [str(Path(sys.executable).with_name(name)), *map(str, words)]
    done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=60)
    return (done.stdout + done.stderr).splitlines()


def launcher_problems(config: dict[str, Any]) -> list[str]:
    """A file for ``ray up``: Ray's own validation, the cloud's of each node, and our rules."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    try:
        validate_config(prepare_config(copy.deepcopy(config)))
    except Exception as error:  # noqa: BLE001 - each of Ray's checks raises its own kind
        return [f"Ray: {error}"]
    check = NODE_CONFIGS.get(config["provider"]["type"], lambda _: [])
    return [
        *(
            f"{name}: {problem}"
            for name, kind in config.get("available_node_types", {}).items()
            for problem in check(kind["node_config"])
        ),
        *_start_problems(config),
        *_pool_problems(config),
        *shell_problems(_all_commands(config)),
    ]


def _all_commands(config: dict[str, Any]) -> Iterator[str]:
    for name, commands in config.items():
        if name.endswith("_commands"):
            yield from commands


def _start_problems(config: dict[str, Any]) -> Iterator[str]:
    """Token everywhere, dashboard on localhost alone, nothing of ours on the head's CPUs."""
    heads, workers = (
        [line for line in config[f"{role}_start_ray_commands"] if "ray start" in line]
        for role in ("head", "worker")
    )
    for line in (*heads, *workers):
        if "RAY_AUTH_MODE=token ray start" not in line:
            yield f"starts without a token: {line}"
    if TOKEN not in config.get("file_mounts", {}):
        yield "the token is not copied to the nodes"
    for line in heads:
        if "--dashboard-host=127.0.0.1" not in line:
            yield f"the dashboard is not on localhost: {line}"
        types = config.get("available_node_types")
        head = types[config["head_node_type"]]["resources"] if types else {}
        if head.get("CPU") != 0 and "--num-cpus=0" not in line:
            yield "the head would be given work"


def _pool_problems(config: dict[str, Any]) -> Iterator[str]:
    """Spot before on-demand, from zero, with a sidecar where there can be notices."""
    if config["provider"]["type"] == "local":
        return
    types = config["available_node_types"]
    if types["gpu_spot"]["priority"] <= types["gpu_on_demand"]["priority"]:
        yield "on-demand machines would be started as soon as spot ones"
    for name, kind in types.items():
        if name != config["head_node_type"] and kind["min_workers"]:
            yield f"{name} costs money while nothing runs"
    if not any("raymeld spot-notice" in line for line in config["worker_start_ray_commands"]):
        yield "nobody listens for spot notices"


def kuberay_problems(document: dict[str, Any]) -> list[str]:
    """A RayJob or RayCluster: the strict schema, and our rules."""
    found = kubernetes_schema.problems(document)
    if found:
        return found
    spec = document["spec"]
    cluster = spec.get("rayClusterSpec", spec)
    found += shell_problems([spec["entrypoint"]] if "entrypoint" in spec else [])
    if cluster.get("authOptions", {}).get("mode") != "token":
        found.append("starts without a token")
    head = cluster["headGroupSpec"]
    if head.get("serviceType") != "ClusterIP" or head.get("enableIngress"):
        found.append("the dashboard can be reached from outside")
    if head["rayStartParams"].get("num-cpus") != "0":
        found.append("the head would be given work")
    for group in cluster["workerGroupSpecs"]:
        found += _drain_problems(group["groupName"], group["template"]["spec"])
    return found


def _drain_problems(name: str, pod: dict[str, Any]) -> Iterator[str]:
    for container in pod["containers"]:
        given = {variable["name"]: variable["value"] for variable in container.get("env", [])}
        drain = float(given.get(DRAIN, 30))  # 30: what Ray 2.60 takes by itself
        grace = pod.get("terminationGracePeriodSeconds", 30)  # Kubernetes' own
        if grace < drain + DRAIN_MARGIN:
            yield f"{name}: killed after {grace} s, but drains for {drain:g} s"


def shell_problems(commands: Iterable[str]) -> list[str]:
    """Shell commands: shellcheck, and whether the programs they call take those arguments."""
    found = []
    for command in commands:
        found += tool("shellcheck", "--shell=bash", "--format=gcc", "-", text=command)
        found += call_problems(command)
    return found


def call_problems(text: str) -> list[str]:
    """Calls of ``raymeld`` and ``ray`` in some lines of shell: does the option exist?"""
    found = []
    for program in ("raymeld", "ray"):
        for call in _calls(program, text):
            try:
                _parse(program, _words(call))
            except Exception as error:  # noqa: BLE001 - click's own, whichever click it is
                found.append(f"{program} {call}: {type(error).__name__} {error}")
    return found


def _calls(program: str, text: str) -> Iterator[str]:
    """What follows the program's name, up to the end of the line or of the quotes it is in."""
    for line in text.replace("\\\n", " ").splitlines():
        if line.lstrip().startswith("#"):
            continue
        for match in re.finditer(rf"(?<![\w./:-])(['\"]?)\b{program} (?=[a-z])", line):
            rest = line[match.end() :]
            yield rest.partition(match[1])[0] if match[1] else rest


def _words(call: str) -> list[str]:
    """The arguments, up to what ends the call: an operator or a redirection."""
    expanded = re.sub(r"\$\{?\w+\}?", "1", call)  # a number does for every variable
    lexer = shlex.shlex(expanded, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    words = list(lexer)
    ends = [n for n, word in enumerate(words) if set(word) <= set("();<>|&")]
    return words[: min(ends, default=len(words))]


def _parse(program: str, words: list[str]) -> None:
    name, *rest = words
    if program == "raymeld" and name == "submit":
        _parse("raymeld", rest[rest.index("--") + 1 :])  # the merge that is submitted
    command = _commands(program)[name]
    command.make_context(name, rest)


@functools.cache
def _commands(program: str) -> dict[str, Any]:
    if program == "raymeld":
        return typer.main.get_command(app).commands  # type: ignore[attr-defined]
    from ray.scripts.scripts import cli

    return cli.commands


def locked() -> dict[str, str]:
    """The version of each package in the lock file."""
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


def version_problems(dockerfile: str) -> list[str]:
    """Packages of the image that the lock file does not have, or has in another version."""
    installed = dict(re.findall(r'"([\w-]+)(?:\[\w+\])?==([^"]+)"', dockerfile))
    wanted = {**locked(), "boto3": locked()["botocore"]}  # these two are released together
    missing = {"ray", "torch"} - installed.keys()
    return [
        *(f"{name} is not pinned" for name in missing),
        *(f"{name}: {v}, not {wanted[name]}" for name, v in installed.items() if v != wanted[name]),
    ]

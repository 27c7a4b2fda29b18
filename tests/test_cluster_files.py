"""The files for clusters are right, as far as that can be said without one.

Each check is shown a planted mistake too: a check that finds nothing proves nothing.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cluster_files import (
    AWS,
    DOCKERFILE,
    GCP,
    ON_PREMISES,
    RAY_CLUSTER,
    RAY_JOB,
    ROOT,
    SLURM,
    kuberay_problems,
    launcher_problems,
    load,
    locked,
    shell_problems,
    tool,
    version_problems,
)

from merge_core import __version__

Change = Callable[[Any], object]
LAUNCHER = {"aws": AWS, "gcp": GCP, "on-premises": ON_PREMISES}
KUBERAY = {"job": RAY_JOB, "cluster": RAY_CLUSTER}


@pytest.mark.parametrize("path", LAUNCHER.values(), ids=LAUNCHER)
def test_a_launcher_file_is_right(path: Path) -> None:
    assert launcher_problems(load(path)) == []


@pytest.mark.parametrize("path", KUBERAY.values(), ids=KUBERAY)
def test_a_kuberay_file_is_right(path: Path) -> None:
    assert kuberay_problems(load(path)) == []


def replace_in(role: str, old: str, new: str) -> Change:
    """A change of the commands that start Ray on the head or on the workers."""

    def change(config: Any) -> None:
        name = f"{role}_start_ray_commands"
        before = list(config[name])
        config[name] = [line.replace(old, new) for line in before]
        assert config[name] != before

    return change


def node(name: str) -> Callable[[Any], Any]:
    return lambda config: config["available_node_types"][name]["node_config"]


ANYWHERE: list[tuple[Change, str]] = [
    (lambda c: c.update(max_worker=3), "'max_worker' was unexpected"),
    (lambda c: c.update(file_mounts={}), "the token is not copied"),
    (replace_in("head", "RAY_AUTH_MODE=token ", ""), "starts without a token"),
    (replace_in("worker", "RAY_AUTH_MODE=token ", ""), "starts without a token"),
    (replace_in("head", "127.0.0.1", "0.0.0.0"), "dashboard is not on localhost"),
    (replace_in("head", "--dashboard-host=127.0.0.1 ", ""), "dashboard is not on localhost"),
    (replace_in("worker", "--address=", "--adress="), "No such option"),
    (replace_in("head", "ulimit -n 65536;", "ulimit -n 65536; if"), "SC1"),
    (lambda c: c["setup_commands"].append("echo $(ls *.x"), "SC1"),
]

IN_A_CLOUD: list[tuple[Change, str]] = [
    (lambda c: c.update(head_node_type="haed"), "head_node_type"),
    (lambda c: c["available_node_types"]["gpu_spot"].update(max_wokers=3), "max_wokers"),
    (lambda c: c["available_node_types"]["gpu_spot"].update(resources={"GPU": 0.5}), "0.5"),
    (
        lambda c: c["available_node_types"]["gpu_spot"].update(min_workers=99),
        "sum of `min_workers`",
    ),
    (lambda c: c["available_node_types"]["gpu_spot"].update(min_workers=1), "costs money"),
    (lambda c: c["available_node_types"]["gpu_spot"].update(priority=0), "on-demand machines"),
    (lambda c: c["available_node_types"]["head"].update(resources={"CPU": 8}), "given work"),
    (replace_in("worker", "raymeld spot-notice", "true"), "nobody listens"),
    (replace_in("worker", "spot-notice", "spot-notcie"), "spot-notcie"),
    (replace_in("worker", "spot-notice --address", "spot-notice --head"), "No such option"),
]

ON_AWS: list[tuple[Change, str]] = [
    (
        lambda c: node("head")(c).update(InstanceTyp="x"),
        'Unknown parameter in input: "InstanceTyp"',
    ),
    (lambda c: node("head")(c).update(InstanceType="m7i.3xlarge"), "knows no 'm7i.3xlarge'"),
    (lambda c: node("head")(c).update(ImageId=["a"]), "Invalid type for parameter ImageId"),
    (
        lambda c: node("gpu_spot")(c)["InstanceMarketOptions"].update(MarketType="Spot"),
        "knows no 'Spot'",
    ),
    (
        lambda c: node("head")(c)["BlockDeviceMappings"][0]["Ebs"].update(VolumeSize="150"),
        "Invalid type for parameter BlockDeviceMappings[0].Ebs.VolumeSize",
    ),
]

ON_GCP: list[tuple[Change, str]] = [
    (lambda c: node("head")(c).update(machinetype="x"), "'machinetype' was unexpected"),
    (lambda c: node("gpu_spot")(c).update(scheduling=[{"preemptible": True}]), "$.scheduling"),
    (lambda c: node("gpu_spot")(c)["scheduling"].update(provisioningModel="Spot"), "'Spot'"),
    (lambda c: node("head")(c)["disks"][0].update(boot="yes"), "$.disks[0].boot"),
]

ON_PREMISES_ALONE: list[tuple[Change, str]] = [
    (lambda c: c["provider"].pop("head_ip"), "head_ip"),
    (lambda c: c.update(available_node_types={"x": {}}), "not supported for on-premise"),
    (replace_in("head", "--num-cpus=0", ""), "given work"),
]

MISTAKES = [
    *((path, change, said) for path in LAUNCHER.values() for change, said in ANYWHERE),
    *((path, change, said) for path in (AWS, GCP) for change, said in IN_A_CLOUD),
    *((AWS, change, said) for change, said in ON_AWS),
    *((GCP, change, said) for change, said in ON_GCP),
    *((ON_PREMISES, change, said) for change, said in ON_PREMISES_ALONE),
]


@pytest.mark.parametrize(
    ("path", "change", "said"), MISTAKES, ids=[f"{p.stem}: {said}" for p, _, said in MISTAKES]
)
def test_a_mistake_in_a_launcher_file_is_found(path: Path, change: Change, said: str) -> None:
    config = load(path)
    change(config)

    found = launcher_problems(config)

    assert any(said in problem for problem in found), found


def cluster_of(document: Any) -> Any:
    return document["spec"].get("rayClusterSpec", document["spec"])


def pod(document: Any) -> Any:
    return cluster_of(document)["workerGroupSpecs"][0]["template"]["spec"]


def drain_by_default(document: Any) -> None:
    del pod(document)["containers"][0]["env"]
    pod(document)["terminationGracePeriodSeconds"] = 35


ON_KUBERAY: list[tuple[Change, str]] = [
    (lambda d: cluster_of(d).update(rayversion="2.60.0"), "'rayversion' was unexpected"),
    (lambda d: cluster_of(d)["workerGroupSpecs"][0].update(maxReplica=3), "'maxReplica'"),
    (lambda d: cluster_of(d)["workerGroupSpecs"][0].update(replicas="0"), "'0' is not of type"),
    (lambda d: cluster_of(d)["workerGroupSpecs"][0].pop("groupName"), "'groupName' is a required"),
    (
        lambda d: cluster_of(d)["headGroupSpec"]["rayStartParams"].update({"num-cpus": 0}),
        "0 is not",
    ),
    (lambda d: cluster_of(d)["headGroupSpec"]["rayStartParams"].pop("num-cpus"), "given work"),
    (lambda d: cluster_of(d)["headGroupSpec"].update(serviceType="LoadBalancer"), "from outside"),
    (lambda d: cluster_of(d)["headGroupSpec"].update(enableIngress=True), "from outside"),
    (lambda d: cluster_of(d).pop("authOptions"), "without a token"),
    (lambda d: cluster_of(d).update(authOptions={"mode": "disabled"}), "without a token"),
    (lambda d: cluster_of(d).update(authOptions={"mode": "tokens"}), "'tokens' is not one of"),
    (lambda d: pod(d).update(terminationGracePeriodSeconds=100), "killed after 100 s, but drains"),
    (lambda d: pod(d).pop("terminationGracePeriodSeconds"), "killed after 30 s, but drains"),
    (drain_by_default, "killed after 35 s, but drains for 30 s"),
    (lambda d: pod(d).update(nodeSelector={"spot": True}), "True is not of type"),
    (lambda d: pod(d)["containers"][0]["env"][0].update(value=100), "100 is not of type"),
    (lambda d: pod(d)["containers"][0].update(volumemounts=[]), "'volumemounts' was unexpected"),
    (lambda d: pod(d).pop("containers"), "'containers' is a required"),
]

IN_A_JOB: list[tuple[Change, str]] = [
    (lambda d: d["spec"].update(submissionMode="k8sJobMode"), "'k8sJobMode' is not one of"),
    (lambda d: d["spec"].update(backOffLimit=2), "'backOffLimit' was unexpected"),
    (lambda d: d["spec"].update(entrypoint="raymeld merge a b --outdir c"), "No such option"),
    (lambda d: d["spec"].update(entrypoint="raymeld merge a"), "Missing"),
]

KUBERAY_MISTAKES = [
    *((path, change, said) for path in KUBERAY.values() for change, said in ON_KUBERAY),
    *((RAY_JOB, change, said) for change, said in IN_A_JOB),
]


@pytest.mark.parametrize(
    ("path", "change", "said"),
    KUBERAY_MISTAKES,
    ids=[f"{p.stem}: {said}" for p, _, said in KUBERAY_MISTAKES],
)
def test_a_mistake_in_a_kuberay_file_is_found(path: Path, change: Change, said: str) -> None:
    document = load(path)
    change(document)

    found = kuberay_problems(document)

    assert any(said in problem for problem in found), found


def test_the_slurm_script_is_right_and_a_mistake_in_it_is_found() -> None:
    script = SLURM.read_text()

    assert subprocess.run(["bash", "-n", SLURM], capture_output=True).returncode == 0
    assert shell_problems([script]) == []
    for old, new, said in [
        ("(($# < 3))", "(($# < 3)", "SC1"),
        ("$SLURM_CPUS_ON_NODE", "$cpus_on_node", "SC2154"),
        ('"$adapter" --out', '"$adapter" --output', "No such option"),
        ("--include-dashboard=false", "--include-dashbord=false", "No such option"),
    ]:
        broken = script.replace(old, new)
        assert broken != script
        assert any(said in problem for problem in shell_problems([broken])), (old, new)


def test_the_dockerfile_is_right_and_a_mistake_in_it_is_found() -> None:
    text = DOCKERFILE.read_text()

    assert tool("hadolint", DOCKERFILE) == []
    for old, new, said in [
        ("FROM python:3.11-slim-bookworm", "FROM python", "DL3006"),
        ("WORKDIR /home/ray", "WORKDIR home/ray", "DL3000"),
        ("pip install --no-cache-dir", "pip install", "DL3042"),
        ("USER 1000", "USR 1000", "unexpected 'U'"),
        ("*) echo", "* echo", "SC1"),
    ]:
        broken = text.replace(old, new)
        assert broken != text
        said_of_it = tool("hadolint", "-", text=broken)
        assert any(said in line for line in said_of_it), (said, said_of_it)


def test_the_image_has_the_versions_that_are_tested_and_another_is_found() -> None:
    text = DOCKERFILE.read_text()

    assert version_problems(text) == []
    assert version_problems(text.replace("ray[default]==2.60.0", "ray[default]==2.61.0"))
    assert version_problems(text.replace("ray[default]==2.60.0", "ray[default]"))
    assert version_problems(text.replace("torch==2.13.0", "torch"))


def test_every_file_names_the_version_of_ray_and_our_own() -> None:
    for path in KUBERAY.values():
        assert cluster_of(load(path))["rayVersion"] == locked()["ray"]
    for path in (*LAUNCHER.values(), *KUBERAY.values(), DOCKERFILE):
        named = re.findall(r"raymeld:([\w.]+)-(?:cuda|cpu)", path.read_text())
        assert set(named) == {__version__}, path


@pytest.mark.parametrize(
    "path", [*LAUNCHER.values(), *KUBERAY.values(), SLURM, DOCKERFILE], ids=lambda p: p.name
)
def test_the_page_leads_to_every_file(path: Path) -> None:
    assert str(path.relative_to(ROOT)) in (ROOT / "docs" / "cluster.md").read_text()

"""``raymeld doctor --out hf://org/name``: whether a merge could go there, before it is tried."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fault_proxy import FaultProxy
from handmade import files_below, small_merge
from hub_server import Hub
from pushes import TOKEN
from typer.testing import CliRunner

from cluster.cli import app
from merge_core.stores import scratch
from merge_core.stores.scratch import Scratch

INPUTS = ("base", "adapter")
TO_HUB = ("--out", "hf://me/merge", "--state", "state", "--scratch", "scratch")

Doctor = Callable[..., dict[str, Any]]


@pytest.fixture
def doctor(
    tmp_path: Path, hub: Hub, before_hub: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> Doctor:
    """Its answer, after which nothing must be other than before."""
    small_merge(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(scratch, "file_system_of", lambda _: "ext4")

    def ask(*words: str) -> dict[str, Any]:
        before, models = files_below(tmp_path), set(hub.repos)
        done = CliRunner().invoke(app, ["doctor", *words, "--json"], catch_exceptions=False)
        assert (files_below(tmp_path), set(hub.repos)) == (before, models)
        assert before_hub.tally("PUT").requests == 0
        found: dict[str, Any] = json.loads(done.stdout)
        assert done.exit_code == (0 if found["ok"] else 1)
        return found

    return ask


def problems(found: dict[str, Any]) -> list[str]:
    return [f"{some} {one['what']}" for one in found["problems"] for some in one["places"]]


@pytest.mark.parametrize("inputs", [(), INPUTS])
def test_a_merge_that_could_go_to_the_hub_is_told_so(
    doctor: Doctor, hub: Hub, tmp_path: Path, inputs: tuple[str, ...]
) -> None:
    found = doctor(*inputs, *TO_HUB)  # a model that is yet to be made
    assert problems(found) == []
    (node,) = found["nodes"]
    assert node["out"] == {"refusal": None, "arrived": True}
    room = node["scratch"].pop("room")
    assert room > 1_000_000
    where = str(tmp_path / "scratch")
    assert node["scratch"] == {"path": where, "in_memory": False, "refusal": None}
    hub.repo("me/merge", {"README.md": b"hello"}, private=True)
    assert problems(doctor(*inputs, *TO_HUB)) == []

    said = CliRunner().invoke(app, ["doctor", *inputs, *TO_HUB]).stdout
    assert f"hf://me/merge: state in {tmp_path / 'state'}, to be made in {tmp_path}" in said
    assert said.splitlines()[-3].split()[-1] == "GB"  # the column of the scratch


@pytest.mark.parametrize("words", [["doctor"], ["plan", *INPUTS]])
def test_a_state_without_a_model_is_refused(words: list[str]) -> None:
    done = CliRunner().invoke(app, [*words, "--state", "state"])
    assert done.exit_code == 2
    assert "--state: goes with a merge onto the hub alone" in done.stderr


def test_a_token_that_may_not_write_is_told(doctor: Doctor, hub: Hub) -> None:
    hub.readers.add(TOKEN)
    assert problems(doctor(*TO_HUB)) == ["hf://me/merge@main the token may only read"]
    hub.repo("me/merge", {}, private=True)
    (said,) = problems(doctor(*TO_HUB))
    assert said.startswith("hf://me/merge@main the hub answered 403 (you must use a write token")
    assert problems(doctor(*INPUTS, *TO_HUB)) == [said]


def test_an_account_makes_models_of_its_own_and_its_organisations(doctor: Doctor) -> None:
    assert problems(doctor(*TO_HUB, "--out", "hf://Ours/merge")) == []
    said = "hf://strangers/merge@main the account me may not make models of strangers"
    assert problems(doctor(*TO_HUB, "--out", "hf://strangers/merge")) == [said]


@pytest.mark.parametrize("inputs", [(), INPUTS])
@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (("--out", "hf://me/merge"), "hf://me/merge OUT cannot be written: a merge onto the hub"),
        (
            ("--out", "hf://me/merge", "--state", "s3://b/k", "--anonymous"),
            "s3://b/k STATE cannot be written: STATE is to be written to, and --anonymous signs",
        ),
        ((*TO_HUB, "--state", "base/config.json/x"), "STATE cannot be written: Not a dir"),
        ((*TO_HUB, "--out", "hf://me/other"), "hf://me/other@main the model holds something else"),
        ((*TO_HUB, "--out", "hf://me/open"), "hf://me/open@main the model exists already, and"),
    ],
)
def test_what_a_merge_would_be_refused_for_is_a_problem(
    doctor: Doctor, hub: Hub, inputs: tuple[str, ...], words: tuple[str, ...], wanted: str
) -> None:
    hub.repo("me/other", {"model.safetensors": b"precious"}, private=True)
    hub.repo("me/open", {"README.md": b"hello"})
    assert wanted in " / ".join(problems(doctor(*inputs, *words)))


def test_a_scratch_that_is_too_small_or_in_memory_or_cannot_be_written_is_told(
    doctor: Doctor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scratch, "file_system_of", lambda _: "tmpfs")
    found = doctor(*INPUTS, *TO_HUB)
    assert problems(found) == []
    memory = f"the scratch {tmp_path / 'scratch'} is memory, not a disk (tmpfs)"
    assert memory in [note["what"] for note in found["notes"]]
    with monkeypatch.context() as patch:
        patch.setattr(Scratch, "room", 5_000)
        (said,) = problems(doctor(*INPUTS, *TO_HUB))
    assert "has room for 0.00 GB, and the largest file takes 0.00 GB" in said

    (said,) = problems(doctor(*TO_HUB, "--scratch", "base/config.json/deep"))
    assert "base/config.json/deep cannot be used: Not a directory" in said

"""``raymeld push``, as it is typed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fault_proxy import FaultProxy
from hub_server import Hub
from pushes import TOKEN, assert_pushed
from test_json import hold
from typer.testing import CliRunner

from cluster.cli import app


def push(*words: object, hub: Hub, home: Path, token: str) -> subprocess.CompletedProcess[str]:
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(home),
        "HF_ENDPOINT": hub.address,
        "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": token,
    }
    command = [str(Path(sys.executable).with_name("raymeld")), "push", *map(str, words)]
    return subprocess.run(
        command, cwd=home, env=environment, capture_output=True, text=True, timeout=120
    )


def test_a_merge_is_pushed_by_one_command(merged: Path, hub: Hub, tmp_path: Path) -> None:
    hub.tokens[TOKEN] = "me"

    done = push(merged, "me/merge", "--json", hub=hub, home=tmp_path, token=TOKEN)

    assert done.returncode == 0, done.stderr
    repo = hub.repos["me/merge"]
    assert_pushed(repo, merged)
    assert repo.private
    document = json.loads(done.stdout)
    hold("push", document)
    assert document == {
        "ok": True,
        "out": str(merged),
        "model": "me/merge",
        "commit": f"{hub.address}/me/merge/commit/{repo.refs['main']}",
    }
    assert "the hub holds model-00001-of-00004.safetensors" in done.stderr
    assert TOKEN not in done.stdout + done.stderr

    again = push(merged, "me/merge", hub=hub, home=tmp_path, token=TOKEN)
    assert again.returncode == 0
    assert "me/merge has all of it already" in again.stderr
    assert "Upload" not in again.stderr  # huggingface_hub's own bar, over nothing


def test_a_model_is_public_where_that_is_asked_for(merged: Path, hub: Hub, tmp_path: Path) -> None:
    hub.tokens[TOKEN] = "me"

    done = push(
        merged, "hf://me/merge@main", "--public", "--overwrite", hub=hub, home=tmp_path, token=TOKEN
    )

    assert done.returncode == 0, done.stderr
    assert not hub.repos["me/merge"].private
    assert done.stdout.startswith(f"pushed   {hub.address}/me/merge/commit/")


@pytest.mark.parametrize("words", [("only",), ("me/a--b",), ("me/merge@main", "--revision", "x")])
def test_a_bad_name_is_refused_before_anything_is_asked(
    merged: Path, before_hub: FaultProxy, words: tuple[str, ...]
) -> None:
    done = CliRunner().invoke(app, ["push", str(merged), *words])

    assert done.exit_code == 2
    assert words[0] in done.stderr
    assert before_hub.tally().requests == 0


def test_what_is_no_merge_is_not_pushed(hub: Hub, tmp_path: Path) -> None:
    hub.tokens[TOKEN] = "me"

    done = push(tmp_path, "me/merge", hub=hub, home=tmp_path, token=TOKEN)

    assert done.returncode == 2
    assert "is no merge of raymeld's" in done.stderr
    assert hub.repos == {}

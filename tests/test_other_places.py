"""A path is only a name: nodes that have something else there are told before the first shard."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from clusters import joined, running_cluster
from hub_client import HubClient
from hub_server import Hub
from models import make_adapter, make_base
from typer.testing import CliRunner

from cluster.cli import app

TOKEN = "hf_of-this-test"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """What only the driver's machine has."""
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode:
        pytest.skip("mounting takes root")
    (tmp_path / "results").mkdir()
    return tmp_path / "results" / "out"


def test_a_node_that_has_another_out_or_state_is_told_before_the_first_shard(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_base(tmp_path / "base", num_hidden_layers=1)
    adapter = make_adapter(tmp_path / "adapter", base)
    client, mounts = HubClient(monkeypatch, tmp_path / "hf"), f"mount -t tmpfs none {out.parent}"
    with (
        Hub() as hub,
        running_cluster(cpus=0) as address,
        joined(address, cpus=1, label="has=mounts", mounts=mounts),
    ):
        client.use(hub.address)
        client.log_in(TOKEN)
        hub.tokens[TOKEN] = "me"
        for words in (["--out", str(out)], ["--out", "hf://me/merged", "--state", f"{out}-state"]):
            command = ["merge", str(base), str(adapter), *words, "--address", address]
            done = CliRunner().invoke(app, [*command, "--device", "cpu", "--workers", "1"])
            assert done.exit_code == 1, done.output
            assert f"{words[-1]}: this node has another place of that name, or none" in done.output
            assert "attempt" not in done.output
        client.close()

"""A hub whose address holds a password: nothing is asked there, and nobody reads the password."""

from __future__ import annotations

from pathlib import Path

import pytest
from fault_proxy import FaultProxy
from handmade import small_merge
from hub_client import HubClient
from typer.testing import CliRunner

from cluster.cli import app

SAID = "HF_ENDPOINT holds credentials. Leave them out: a token belongs into HF_TOKEN"
TO_HUB = ("--out", "hf://me/merge", "--state", "state")


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("plan", "hf://org/base", "hf://org/adapter"), 2),
        (("plan", "base", "adapter", *TO_HUB), 2),
        (("merge", "base", "adapter", *TO_HUB, "--address", "inline"), 2),
        (("push", "{merged}", "me/merge"), 2),
        (("verify", "hf://me/merge"), 2),
        (("status", "hf://me/merge"), 2),
        (("doctor", *TO_HUB), 1),
    ],
    ids=lambda one: one[0] if isinstance(one, tuple) else "",
)
def test_an_address_with_a_password_is_refused_and_not_printed(
    merged: Path,
    client: HubClient,
    before_hub: FaultProxy,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    words: tuple[str, ...],
    code: int,
) -> None:
    caplog.set_level("DEBUG")
    small_merge(tmp_path)
    monkeypatch.chdir(tmp_path)
    host = before_hub.address.removeprefix("http://")
    client.use(f"http://joe:sesame@{host}")

    done = CliRunner().invoke(app, [word.format(merged=merged) for word in words])

    assert done.exit_code == code
    assert host in done.output
    assert SAID in " ".join(done.output.split())
    assert "sesame" not in done.output + caplog.text + str(done.exception)
    assert before_hub.tally().requests == 0
    assert not (tmp_path / "state").exists()

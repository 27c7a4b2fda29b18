"""A log that cannot be written: nothing else changes by it."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import pytest
from test_talk import progress, watched
from typer import Exit
from typer.testing import CliRunner

from cluster import console
from cluster.answering import answering
from cluster.cli import app
from cluster.log_lines import log
from merge_core.errors import StorageError

ERROR = StorageError("no space", "/data/out", "Free space there.")


def full_disk() -> TextIO:
    return open("/dev/full", "w", buffering=1)


def pipe_that_nobody_reads() -> TextIO:
    read, write = os.pipe()
    os.close(read)
    return os.fdopen(write, "w", buffering=1)


@pytest.fixture(params=["json", "text"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("RAYMELD_LOG", request.param)
    return str(request.param)


@pytest.fixture(params=[full_disk, pipe_that_nobody_reads])
def nowhere(request: pytest.FixtureRequest) -> Iterator[TextIO]:
    """A stderr that refuses what is written to it. Not set here: pytest would set its own again
    before the test begins.
    """
    stream: TextIO = request.param()
    with pytest.raises(OSError, match=r"No space left|Broken pipe"):
        stream.write("so it does\n")
    yield stream
    with contextlib.suppress(OSError):
        stream.close()


@pytest.mark.usefixtures("form")
def test_talk_that_cannot_be_written_stops_nothing(
    nowhere: TextIO, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stderr", nowhere)

    watched(monkeypatch, [(0.0, progress(0)), (10.0, progress(10**9))])

    assert capsys.readouterr().out == ""


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("debug", [False, True])
def test_an_error_that_cannot_be_told_keeps_its_exit_code_and_its_document(
    nowhere: TextIO,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    debug: bool,
) -> None:
    monkeypatch.setattr(sys, "stderr", nowhere)

    with pytest.raises(Exit) as caught, answering(as_json=True, debug=debug):
        raise ERROR

    assert caught.value.exit_code == ERROR.exit_code
    assert json.loads(capsys.readouterr().out)["error"] == str(ERROR)


def test_what_is_said_while_stderr_is_closed_does_not_go_to_stdout(
    form: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stderr", None)

    log("a line")
    console.complain(ERROR, as_json=False)
    watched(monkeypatch, [(0.0, progress(0)), (10.0, progress(10**9))])

    assert capsys.readouterr().out == "", form


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["verify", "OUT"], 3, "1 check failed, the first: digest: model-0000"),
        (["doctor", "--out", "OUT/model.safetensors.index.json"], 1, "index.json: OUT cannot be w"),
    ],
)
def test_an_answer_that_is_bad_news_is_also_an_error_in_a_log_of_lines(
    monkeypatch: pytest.MonkeyPatch, finished: Path, words: list[str], code: int, said: str
) -> None:
    monkeypatch.setenv("RAYMELD_LOG", "json")
    file = min(finished.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1] + b"\xff")

    done = CliRunner().invoke(app, [word.replace("OUT", str(finished)) for word in words])

    *_, record = map(json.loads, done.stderr.splitlines())
    assert done.exit_code == record["exit_code"] == code
    assert record["level"] == "error"
    assert said in record["message"]

"""JSON lines of a log, and the same log as people read it."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_talk import progress, watched
from typer.testing import CliRunner

from cluster.cli import app
from cluster.log_lines import LogPrinter, log, logs_json, plain

JOB = '{"metadata": {"job_submission_id": "raymeld-0123456789ab-1"}}'


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAYMELD_LOG", "RAY_JOB_CONFIG_JSON_ENV_VAR"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("chosen", "in_a_job", "as_json"),
    [
        (None, False, False),
        (None, True, True),
        ("", True, True),
        ("json", False, True),
        ("text", True, False),
    ],
)
def test_a_job_logs_json_unless_it_is_told_otherwise(
    monkeypatch: pytest.MonkeyPatch, chosen: str | None, in_a_job: bool, as_json: bool
) -> None:
    if chosen is not None:
        monkeypatch.setenv("RAYMELD_LOG", chosen)
    if in_a_job:
        monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", JOB)

    assert logs_json() is as_json


def test_another_form_of_log_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYMELD_LOG", "xml")

    done = CliRunner().invoke(app, ["plan", "/no/base", "/no/adapter"])

    assert done.exit_code == 2
    assert "RAYMELD_LOG: 'xml' is no form of a log" in done.stderr


def test_a_merge_says_in_json_what_it_does_and_answers_as_ever(
    monkeypatch: pytest.MonkeyPatch, base: Path, adapter: Path, out: Path
) -> None:
    monkeypatch.setenv("RAYMELD_LOG", "json")
    words = ["merge", base, adapter, "--out", out, "--address", "inline", "--device", "cpu"]

    done = CliRunner().invoke(app, list(map(str, words)))

    assert done.exit_code == 0
    assert done.stdout.splitlines()[-1] == f"result   {out}"
    records = [json.loads(line) for line in done.stderr.splitlines()]
    assert records[0]["message"].startswith(f"base     {base}")
    assert {(record["level"], record["out"]) for record in records} == {("info", str(out))}
    assert "job_id" not in records[0]


def test_an_error_is_one_line_with_its_exit_code(
    monkeypatch: pytest.MonkeyPatch, adapter: Path, out: Path
) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", JOB)
    words = ["merge", "/no/base", str(adapter), "--out", str(out), "--shard-size", "many"]

    done = CliRunner().invoke(app, words)
    record = json.loads(done.stderr)

    assert done.exit_code == record["exit_code"] == 2
    assert (record["level"], record["out"]) == ("error", str(out))
    assert record["job_id"] == "raymeld-0123456789ab-1"
    assert plain(done.stderr) == f"error: {record['message']}\n"


def test_progress_has_its_numbers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAYMELD_LOG", "json")

    watched(monkeypatch, [(0.0, progress(0)), (10.0, progress(10**9))])

    line, done = map(json.loads, capsys.readouterr().err.splitlines())
    assert line["message"] == "merging: 1.00 of 4.00 GB, 0.10 GB/s, 30 s left, 2 workers"
    assert (line["phase"], line["done"], line["total"]) == ("merging", 10**9, 4 * 10**9)
    assert (line["bytes_per_second"], line["workers"]) == (10**8, 2)
    assert done["message"] == "[done]"


def test_quiet_is_quiet_in_json_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAYMELD_LOG", "json")

    watched(monkeypatch, [(0.0, progress(0)), (99.0, progress(10**9))], quiet=True)

    assert capsys.readouterr() == ("", "")


MESSAGES = st.text(st.characters(codec="utf-8"), max_size=20)


def line_of(message: str, level: str) -> str:
    return json.dumps({"time": "2026-01-01T00:00:00.000Z", "level": level, "message": message})


LINES = st.one_of(
    st.builds(line_of, MESSAGES, st.sampled_from(["info", "error"])),
    st.sampled_from(
        ["", "{", "{}", "[1]", "null", '{"ok": true}', '{"message": "no level"}', '{"time": 1'],
    ),
    st.sampled_from(['  "ok": true', "a traceback\r", "{" * 5000, '{"a": ' * 5000, "\u2028{\x0b}"]),
    MESSAGES.filter(lambda text: "\n" not in text),
)


@given(st.lists(LINES, max_size=6), st.booleans(), st.data())
def test_a_log_reads_the_same_however_it_is_cut(
    lines: list[str], ends: bool, data: st.DataObject
) -> None:
    whole = "\n".join(lines) + "\n" * ends
    cuts = data.draw(st.lists(st.integers(0, len(whole)), max_size=8).map(sorted))
    written: list[str] = []
    printer = LogPrinter(written.append)

    for start, end in itertools.pairwise([0, *cuts, len(whole)]):
        printer.write(whole[start:end])
    printer.close()

    assert "".join(written) == plain(whole)


@given(MESSAGES, st.sampled_from(["info", "error"]))
def test_of_a_line_of_ours_its_message_is_left(message: str, level: str) -> None:
    assert plain(f"before\n{line_of(message, level)}\nafter") == (
        f"before\n{'error: ' * (level == 'error')}{message}\nafter"
    )


@pytest.mark.parametrize(
    "line",
    [
        "plain text\n",
        '{"ok": true}\n',
        '{"message": "Ray\'s own", "levelname": "INFO"}\n',
        '{"time": 1, "level": 2, "message": "m"}\n',
        '{"time": "t", "level": "info", "message": null}\n',
        ' {"time": "t", "level": "info", "message": "indented"}\n',
        '{"time": "t", "level": "info", "message": "two"} more\n',
        '{"time": "t", "level": "info", "mess',
    ],
)
def test_what_is_not_ours_passes_unchanged(line: str) -> None:
    assert plain(line) == line


def test_text_passes_at_once_and_a_line_that_may_be_json_waits() -> None:
    written: list[str] = []
    printer = LogPrinter(written.append)

    printer.write("a bar with no e")
    printer.write('nd {"\n{"time": "t", "level": "info", ')
    assert "".join(written) == 'a bar with no end {"\n'
    printer.write('"message": "told"}\n')
    assert "".join(written) == 'a bar with no end {"\ntold\n'


def test_who_wants_json_gets_the_log_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYMELD_LOG", "json")
    written: list[str] = []
    printer = LogPrinter(written.append)

    printer.write(line_of("told", "info"))
    printer.close()

    assert "".join(written) == line_of("told", "info")


def test_a_path_that_is_no_text_can_be_logged_and_printed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    log("no model in /models/\udcff", out=Path("/models/\udcff"))

    line = capsys.readouterr().err
    assert json.loads(line)["out"] == "/models/\udcff"
    assert plain(line) == "no model in /models/?\n"

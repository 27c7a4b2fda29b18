"""What submit decides before it meets a cluster: words, names, addresses, tokens, signals."""

from __future__ import annotations

import inspect
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from cluster.authentication import borrowed_environment, use_token_if_there_is_one
from cluster.cli import app, merge
from cluster.interrupts import noted_interrupts
from cluster.job_watch import Watch
from cluster.jobs import Job, Jobs, connected, next_name
from cluster.jobs_commands import _warn_without_token
from cluster.merge_words import SPEED, recipe_digest
from merge_core.errors import InputError

RECIPE = {
    "base": "/base",
    "adapters": ["/a@0.5", "/b"],
    "out": Path("/out"),
    "adapter_name": None,
    "tokenizer": None,
    "dtype": None,
    "shard_size": "2GB",
    "device_map": None,
    "keep_tied": False,
    "combine": None,
    "density": None,
    "majority_sign": None,
    "seed": None,
    "dequantize": False,
    "simulate_nf4": False,
}


def job(name: str, status: str = "SUCCEEDED", exit_code: int | None = 0) -> Job:
    return Job(
        name=name,
        status=status,
        words="merge",
        message="",
        started=0.0,
        ended=None,
        driver_exit_code=exit_code,
        submission="",
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("base", "/other"),
        ("adapters", ["/b", "/a@0.5"]),
        ("adapters", ["/a@0.6", "/b"]),
        ("out", Path("/elsewhere")),
        ("adapter_name", "checkpoint-5"),
        ("tokenizer", "base"),
        ("dtype", "float32"),
        ("shard_size", "1GB"),
        ("keep_tied", True),
        ("combine", "cat"),
        ("density", 0.5),
        ("majority_sign", "total"),
        ("seed", 1),
        ("dequantize", True),
        ("simulate_nf4", True),
        ("an_option_to_come", "x"),
    ],
)
def test_a_recipe_is_another_when_other_bytes_or_another_place_are_asked_for(
    name: str, value: object
) -> None:
    assert recipe_digest({**RECIPE, name: value}) != recipe_digest(RECIPE)


@pytest.mark.parametrize("name", sorted(SPEED))
def test_a_recipe_is_the_same_however_fast_it_runs(name: str) -> None:
    assert recipe_digest({**RECIPE, name: "x"}) == recipe_digest(RECIPE)


def test_the_digest_of_a_recipe_stays_what_it_is() -> None:
    assert recipe_digest(RECIPE) == "87d7804dbb74"
    assert recipe_digest(dict(reversed(RECIPE.items()))) == "87d7804dbb74"


def test_every_option_of_merge_is_either_of_speed_or_of_the_recipe() -> None:
    named = {*RECIPE, *SPEED} - {"base", "adapters"} | {"words"}
    assert set(inspect.signature(merge).parameters) == named


def test_names_count_up_and_other_merges_do_not_matter() -> None:
    one, other = "0123456789ab", "ffffffffffff"
    jobs = [job(f"raymeld-{one}-2"), job(f"raymeld-{one}-10", "FAILED", 1)]
    assert next_name(one, []) == f"raymeld-{one}-1"
    assert next_name(one, [*jobs, job(f"raymeld-{other}-11", "RUNNING")]) == f"raymeld-{one}-11"


@pytest.mark.parametrize("status", ["PENDING", "RUNNING"])
def test_a_merge_under_way_is_not_submitted_again(status: str) -> None:
    jobs = [job("raymeld-0123456789ab-1"), job("raymeld-0123456789ab-2", status, None)]
    with pytest.raises(InputError, match="raymeld-0123456789ab-2: this merge is under way"):
        next_name("0123456789ab", jobs)


@pytest.mark.parametrize(
    ("status", "driver", "code"),
    [
        ("RUNNING", None, None),
        ("SUCCEEDED", 0, 0),
        ("STOPPED", None, 130),
        ("FAILED", 3, 3),
        ("FAILED", None, 1),
        ("FAILED", -9, 137),
    ],
)
def test_a_job_ends_with_the_exit_code_of_its_driver(
    status: str, driver: int | None, code: int | None
) -> None:
    assert job("raymeld-0123456789ab-1", status, driver).exit_code == code


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("", "Missing argument 'MERGE'"),
        ("-- plan /b /a", "'plan' cannot run as a job"),
        ("-- merge /b /a", "Missing option '--out'"),
        ("-- merge /b /a --out /o --frobnicate", "No such option: --frobnicate"),
        ("merge /b /a --out /o --frobnicate", "No such option: --frobnicate"),
        ("-- merge /b /a --out /o --verify bogus", "'bogus' is not one of"),
        ("-- merge /b /a --out /o --address local", "--address cannot stand behind merge"),
        ("-- merge /b /a --out /o --shard-size many", "'many' is no size"),
        ("-- merge b /a --out /o", "BASE: 'b' is relative"),
        ("-- merge o/b /a --out /o", "BASE: 'o/b' is relative"),
        ("-- merge o/b /a --out /o", "as the cluster's nodes have it; hf://o/b is the hub"),
        ("-- merge /b /a --out o/r", "as the cluster's nodes have it; hf://org/name is the hub"),
        ("-- merge /b a@0.5 --out o", "2 problems"),
        ("-- merge /b /a --out hf://o/m --state s --scratch /n", "STATE: 's' is relative"),
        (
            "-- merge /b /a --out hf://o/m --scratch-limit many",
            "--scratch-limit: 'many' is no size",
        ),
        ("--address ray://head:10001 -- merge /b s3://a --out /o", "no cluster takes jobs there"),
        ("--address auto -- merge /b /a --out /o", "no cluster takes jobs there"),
    ],
)
def test_wrong_words_are_refused_before_a_cluster_is_asked(words: str, said: str) -> None:
    done = CliRunner().invoke(app, ["submit", *words.split()])

    assert done.exit_code == 2
    assert said in done.stderr


def test_a_cluster_that_does_not_answer_is_told_in_one_paragraph() -> None:
    done = CliRunner().invoke(app, ["jobs", "list", "--address", "http://127.0.0.1:9"])

    assert done.exit_code == 1
    assert "no Ray dashboard answers" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("name", ["raysubmit_x", "raymeld-0123456789ab-0", "../version"])
def test_a_name_that_is_not_of_a_merge_is_not_even_asked_for(name: str) -> None:
    with pytest.raises(InputError, match="is not the name of a merge"):
        Jobs(None, "http://head:8265", token_known=True).find(name)


@pytest.mark.parametrize("name", ["", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "file"])
def test_a_token_is_sent_where_there_is_one(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for variable in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(variable, raising=False)
    if name == "file":
        (tmp_path / ".ray").mkdir()
        (tmp_path / ".ray" / "auth_token").write_text("secret")
    elif name:
        monkeypatch.setenv(name, "secret")

    with borrowed_environment():
        assert use_token_if_there_is_one() == bool(name)
        assert os.environ.get("RAY_AUTH_MODE") == ("token" if name else None)

    assert "RAY_AUTH_MODE" not in os.environ


def test_whoever_wants_no_token_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert use_token_if_there_is_one()
    assert os.environ["RAY_AUTH_MODE"] == "disabled"


def test_without_a_token_a_warning_says_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    _warn_without_token(Jobs(None, "http://head:8265", token_known=True))
    assert capsys.readouterr().err == ""
    _warn_without_token(Jobs(None, "http://head:8265", token_known=False))
    assert "RAY_AUTH_MODE=token" in capsys.readouterr().err


def test_the_environment_is_as_before_also_where_nobody_answers() -> None:
    before = dict(os.environ)
    with pytest.raises(Exception, match="no Ray dashboard answers"), connected("127.0.0.1:9"):
        pass
    assert dict(os.environ) == before


@given(st.data())
def test_every_character_of_a_log_is_written_once(data: Any) -> None:
    """Whatever pieces the streams bring, and wherever they break off."""
    log = data.draw(st.text(max_size=30))
    written: list[str] = []
    watch = Watch(Jobs(None, "", token_known=True), "", written.append, lambda: None)
    for _ in range(data.draw(st.integers(0, 4))):
        cuts = sorted(data.draw(st.lists(st.integers(0, len(log)), min_size=1)))
        for start, end in zip([0, *cuts], cuts, strict=False):
            watch._write_from(start, log[start:end], written.append)
    watch._write_from(0, log, written.append)
    assert "".join(written) == log


def test_the_first_signal_waits_to_be_heeded_the_second_does_not() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with noted_interrupts() as interrupts:
        interrupts.heed()
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            interrupts.heed()
        interrupts.heed()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):  # in case that the other one was swallowed
            interrupts.heed()
    assert before == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))

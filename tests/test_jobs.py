"""Merges as Ray Jobs on a real head with dashboard and token: endings, logs, stops, refusals."""

from __future__ import annotations

import contextlib
import json
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from head import Head, driver_of, name_in, running_head, until
from models import assert_same_tensors, make_adapter, make_base, oracle, read_tensors
from proxy import Proxy

from cluster import job_watch
from cluster.job_watch import Watch
from cluster.jobs import Jobs, connected, next_name
from cluster.log_lines import plain
from cluster.merge_words import MergeWords
from cluster.wheel import assemble_wheel
from merge_core.errors import InputError

WAITING = "workers: at most 1 on cuda, each with 1 GPU\n"
"""What a merge says before it waits, for ever, for the GPU that somebody else has."""

Words = tuple[object, ...]


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with running_head() as running:
        yield running


@pytest.fixture(scope="module")
def client(head: Head) -> Iterator[Jobs]:
    """The head's jobs, as the commands see them, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_TOKEN_PATH", str(head.home / ".ray" / "auth_token"))
        with connected(head.address) as jobs:
            yield jobs


@pytest.fixture(scope="module")
def busy(client: Jobs) -> None:
    """Somebody else's job has the only GPU."""
    name = client._client.submit_job(entrypoint="sleep infinity", entrypoint_num_gpus=1)
    until(lambda: client._client.get_job_status(name) == "RUNNING")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("jobs") / "base")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    return make_adapter(tmp_path_factory.mktemp("jobs") / "adapter", base)


@pytest.fixture
def words(base: Path, adapter: Path, tmp_path: Path) -> Words:
    """A merge, as it stands behind submit."""
    return "--", "merge", base, adapter, "--out", tmp_path / "out", "--device", "cpu"


@pytest.fixture
def waiting(words: Words, busy: None) -> Words:
    """A merge that goes on until it is stopped."""
    return *words[:-1], "cuda"


def test_a_merge_runs_as_a_job_and_the_same_again_finds_it_done(
    head: Head, client: Jobs, base: Path, adapter: Path, tmp_path: Path, words: Words
) -> None:
    first = head.raymeld("submit", *words)
    again = head.raymeld("submit", *words, RAYMELD_LOG="text")

    assert first.returncode == 0, first.stdout + first.stderr
    assert "verified digest" in first.stdout
    assert_same_tensors(read_tensors(tmp_path / "out"), oracle(base, adapter))
    assert again.returncode == 0
    assert "already holds this merge" in again.stdout
    listed = json.loads(head.raymeld("jobs", "list", "--json").stdout)["jobs"]
    names = [job["job"] for job in listed if str(tmp_path) in job["words"]]
    assert names == [name_in(first.stdout), name_in(again.stdout)]
    assert names[1] == names[0].removesuffix("1") + "2"
    assert_logged(client.log(names[0]), first.stdout, names[0], tmp_path / "out")
    assert client.log(names[1]) == again.stdout
    assert_workers_logged(head, tmp_path / "out")


def assert_logged(log: str, printed: str, job: str, out: Path) -> None:
    """What a person was shown is what the lines say; all of ours but the answer are JSON."""
    lines = log.splitlines()
    ours = [n for n, line in enumerate(lines) if line.startswith("{")]
    records = [json.loads(lines[n]) for n in ours]
    before, answer = lines[: ours[0]], lines[ours[-1] + 1 :]
    assert "Running entrypoint" in before[-1]
    assert answer[-1] == f"result   {out}"
    assert [*before, *(r["message"] for r in records), *answer] == printed.splitlines()
    assert {(r["level"], r["job_id"], r["out"]) for r in records} == {("info", job, str(out))}
    times = [record["time"] for record in records]
    assert times == sorted(times)
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", time) for time in times)


def assert_workers_logged(head: Head, out: Path) -> None:
    """Each worker has said what it did, in Ray's own form."""
    files = (head.home.parent / "t" / "session_latest" / "logs").glob("worker-*.err")
    lines = [line for file in files for line in file.read_text().splitlines()]
    records = [json.loads(line) for line in lines if line.startswith("{")]
    names = {path.name for path in out.glob("*.safetensors")}
    said = {r["message"]: r for r in records if r.get("out") == str(out)}
    assert said.keys() == {f"{did} {n}" for did in ("merged", "read back") for n in names}
    for name in names:
        record = said[f"merged {name}"]
        assert (record["levelname"], record["phase"]) == ("INFO", "merging")
        assert record["done"] == (out / name).stat().st_size
        assert record["actor_id"]
        assert record["timestamp_ns"] > 0


def test_wrong_input_ends_with_the_drivers_words_and_its_exit_code(
    head: Head, adapter: Path, tmp_path: Path
) -> None:
    words = ("--", "merge", "/no/base", adapter, "--out", tmp_path / "out")

    done = head.raymeld("submit", *words)
    ran_changed = head.submit_changed_code(tmp_path, *words)  # its version was shipped before

    assert done.returncode == ran_changed.returncode == 2
    assert "error: /no/base: BASE does not exist" in done.stdout
    assert "error: changed: BASE does not exist" in ran_changed.stdout
    shown = head.raymeld("jobs", "status", name_in(done.stderr))
    assert shown.returncode == 2
    assert "FAILED, exit code 2" in shown.stdout
    assert "error: /no/base: BASE does not exist" in shown.stdout


def test_a_driver_that_is_killed_ends_as_in_a_shell(head: Head, waiting: Words) -> None:
    with head.started("submit", *waiting) as command:
        command.until_stdout(WAITING)
        driver_of(name_in(command.stdout)).kill()
        assert command.process.wait(60) == 137


def test_a_job_that_ray_cannot_start_is_told_as_that(
    head: Head, client: Jobs, tmp_path: Path
) -> None:
    broken = tmp_path / "raymeld-0-py3-none-any.whl"
    broken.write_bytes(b"no wheel")
    name = "raymeld-abcdefabcdef-1"
    client.submit(name, MergeWords(words=("merge",), recipe="abcdefabcdef"), broken, "")

    done = head.raymeld("jobs", "logs", "--follow", name)

    assert done.returncode == 1
    assert f"job {name}: Ray gave it up: runtime_env setup failed" in done.stderr


def test_ctrl_c_stops_the_job_which_ends_its_merge_cleanly(
    head: Head, client: Jobs, waiting: Words, tmp_path: Path
) -> None:
    with head.started("submit", *waiting) as command:
        command.until_stdout(WAITING)
        command.process.send_signal(signal.SIGINT)
        assert command.process.wait(60) == 130

    job = client.find(name_in(command.stdout))
    assert job.status == "STOPPED"
    assert command.stdout == plain(client.log(job.name))
    assert command.stdout.count("error: interrupted") == 1
    assert not (tmp_path / "out" / "config.json").exists()
    environment = client._client.get_job_info(job.name).runtime_env["env_vars"]
    assert environment["RAY_JOB_STOP_WAIT_TIME_S"] == "60"


def test_sigterm_stops_the_job_too_and_a_second_signal_leaves_at_once(
    head: Head, client: Jobs, waiting: Words
) -> None:
    with head.started("submit", *waiting) as command:
        command.until_stdout(WAITING)
        name = name_in(command.stdout)
        driver = driver_of(name)
        driver.suspend()  # so that it cannot end
        command.process.send_signal(signal.SIGTERM)
        command.until_stderr("Ctrl-C again")
        command.process.send_signal(signal.SIGINT)
        assert command.process.wait(60) == 130

    assert f"raymeld jobs status {name}" in command.stderr
    assert client.find(name).alive
    driver.resume()
    until(lambda: client.find(name).status == "STOPPED")


def test_a_merge_that_is_under_way_is_refused_and_shown_and_stopped(
    head: Head, client: Jobs, waiting: Words
) -> None:
    name = head.raymeld("submit", "--no-wait", *waiting).stdout.strip()

    again = head.raymeld("submit", *waiting, "--workers", "1", "--quiet")
    listed = head.raymeld("jobs", "list")
    alive = head.raymeld("jobs", "status", name, "--json")
    stopped = head.raymeld("jobs", "stop", name)

    assert again.returncode == 2
    assert f"job {name}: this merge is under way already" in again.stderr
    assert f"raymeld jobs logs --follow {name}" in again.stderr
    assert name in listed.stdout
    assert "sleep infinity" not in listed.stdout
    document = json.loads(alive.stdout)
    assert (document["ok"], document["exit_code"], document["ended"]) == (True, None, None)
    assert (alive.returncode, stopped.returncode) == (0, 0)
    assert "STOPPED" in stopped.stderr
    assert client.find(name).exit_code == 130


def test_of_two_that_submit_the_same_at_the_same_time_one_is_refused(
    client: Jobs, tmp_path: Path
) -> None:
    merge = MergeWords(words=("merge", "--help"), recipe="0123456789ab")
    wheel = assemble_wheel(tmp_path)
    name = next_name(merge.recipe, client.all())
    client.submit(name, merge, wheel, "the first")

    with pytest.raises(InputError, match=f"job {name}: this merge is under way already"):
        client.submit(name, merge, wheel, "the second")
    client.submit(name, merge, wheel, "the first")  # as after an answer that was lost

    until(lambda: not client.find(name).alive)
    assert client.find(name).exit_code == 0


def test_a_log_is_whole_however_often_its_connection_breaks(
    head: Head, client: Jobs, waiting: Words
) -> None:
    proxy = Proxy(head.address, b"/logs/tail", [150, 400, 800])
    with (
        contextlib.closing(proxy),
        head.started("submit", *waiting, address=proxy.address) as command,
    ):
        command.until_stdout(WAITING)
        until(lambda: proxy.cut == 3)
        with proxy.down():
            command.until_stderr("no answer from the cluster; trying again")
        client.stop(name_in(command.stdout))
        assert command.process.wait(60) == 130

    assert command.stdout == plain(client.log(name_in(command.stdout)))


@pytest.mark.filterwarnings("ignore:ssl=None is deprecated")  # Ray to aiohttp
def test_a_connection_that_went_dead_without_telling_is_replaced(
    head: Head, client: Jobs, waiting: Words, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_watch, "QUIET_SECONDS", 2)  # Ray takes 1 s to begin
    name = head.raymeld("submit", "--no-wait", *waiting).stdout.strip()
    proxy = Proxy(head.address, b"/logs/tail", [0], dead=True)
    written: list[str] = []

    def write(piece: str) -> None:
        written.append(piece)
        if WAITING in plain("".join(written)):
            client.stop(name)

    with contextlib.closing(proxy), connected(proxy.address) as through_it:
        assert Watch(through_it, name, print, lambda: None).follow(write).status == "STOPPED"

    assert proxy.left == 0
    assert "".join(written) == client.log(name)


def test_a_job_outlives_its_terminal_and_jobs_logs_prints_it_or_follows_it_to_the_end(
    head: Head, client: Jobs, waiting: Words
) -> None:
    with head.started("submit", *waiting) as command:
        command.until_stdout(WAITING)
        command.process.send_signal(signal.SIGHUP)
        assert command.process.wait(60) == -signal.SIGHUP
    name = name_in(command.stdout)
    with head.started("jobs", "logs", "--follow", name) as command:
        command.until_stdout(WAITING)
        so_far = head.raymeld("jobs", "logs", name)
        command.process.send_signal(signal.SIGINT)
        assert command.process.wait(60) == 130
    assert client.find(name).alive
    client.stop(name)
    followed = head.raymeld("jobs", "logs", "--follow", name)

    assert so_far.returncode == 0
    assert WAITING in so_far.stdout
    assert followed.stdout.startswith(so_far.stdout)
    assert followed.returncode == 130
    assert followed.stdout == plain(client.log(name))


@pytest.mark.parametrize(
    ("token", "said"), [("", "Missing authentication token"), ("wrong", "Invalid authentication")]
)
def test_no_token_or_a_wrong_one_is_told_in_one_paragraph(
    head: Head, tmp_path: Path, token: str, said: str
) -> None:
    environment = {"HOME": str(tmp_path), **({"RAY_AUTH_TOKEN": token} if token else {})}

    done = head.raymeld("submit", "--", "merge", "/b", "/a", "--out", "/o", **environment)

    assert done.returncode == 1
    assert said in done.stderr
    assert "~/.ray/auth_token" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []

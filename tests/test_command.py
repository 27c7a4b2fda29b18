"""The command line as a user meets it: answers, exit codes, signals, and nothing left behind."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from head import until
from models import assert_same_tensors, make_adapter, make_base, oracle, read_tensors

from cluster.session import session


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("command") / "base", shard="100KB")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    return make_adapter(tmp_path_factory.mktemp("command") / "adapter", base)


def environment(home: Path) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    return {**kept, "HOME": str(home)}


def raymeld(*words: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name("raymeld")), *map(str, words)]
    return subprocess.run(
        command, cwd=cwd, env=environment(cwd), capture_output=True, text=True, timeout=300
    )


def processes_of(home: Path) -> set[int]:
    """What still runs of a command that was started with this home."""
    return {process.pid for process in psutil.process_iter() if _home(process) == str(home)}


def _home(process: psutil.Process) -> str | None:
    try:
        return process.environ().get("HOME")
    except psutil.Error:  # a zombie, or somebody else's
        return None


def test_plan_answers_in_json_and_touches_nothing(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    done = raymeld("plan", base, adapter, "--out", tmp_path / "out", "--json", cwd=tmp_path)

    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["ok"] is True
    assert sum(shard["merged"] for shard in document["shards"]) == 14
    assert document["pools"][0]["name"] == "cpu"
    assert list(tmp_path.iterdir()) == []


def test_merge_inline_then_verify_then_the_same_again(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    words = ("merge", base, adapter, "--out", out, "--address", "inline", "--json", "--quiet")

    first = raymeld(*words, cwd=tmp_path)
    checked = raymeld("verify", out, "--level", "numeric", "--json", cwd=tmp_path)
    again = raymeld(*words, cwd=tmp_path)

    assert first.returncode == 0, first.stderr
    assert first.stderr == ""
    assert json.loads(first.stdout)["verified"]["level"] == "digest"
    assert json.loads(first.stdout)["device_map"].keys() == {
        "layers 0-1",
        "embeddings, final norm and head",
    }
    assert_same_tensors(read_tensors(out), oracle(base, adapter))
    assert checked.returncode == 0
    assert json.loads(checked.stdout)["findings"] == []
    assert again.returncode == 0
    assert json.loads(again.stdout)["already_there"] is True


def test_out_may_lie_in_a_folder_that_is_yet_to_be_made(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    merged = raymeld(
        *("merge", base, adapter, "--out", "results/new", "--address", "inline"), cwd=tmp_path
    )

    assert merged.returncode == 0, merged.stderr
    assert (tmp_path / "results" / "new" / "config.json").exists()
    assert raymeld("verify", "results/new", cwd=tmp_path).returncode == 0


def test_a_flipped_bit_ends_verify_with_exit_code_3(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    raymeld("merge", base, adapter, "--out", out, "--address", "inline", cwd=tmp_path)
    weights = out / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)

    done = raymeld("verify", out, cwd=tmp_path)

    assert done.returncode == 3
    assert "1 check failed" in done.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["no-such-base", "adapter", "--out", "o"], "BASE does not exist"),
        (["BASE", "BASE", "--out", "o"], "is a checkpoint, not an adapter"),
        (["ADAPTER", "BASE", "--out", "o"], "is a checkpoint, not an adapter"),
        (["BASE", "ADAPTER", "--out", "BASE/merged"], "lie in one another"),
        (["BASE", "ADAPTER", "--out", "o", "--shard-size", "many"], "'many' is no size"),
    ],
)
def test_wrong_input_ends_with_exit_code_2_and_one_paragraph(
    base: Path, adapter: Path, tmp_path: Path, words: list[str], said: str
) -> None:
    places = {"BASE": str(base), "ADAPTER": str(adapter)}
    for name, place in places.items():
        words = [word.replace(name, place) for word in words]

    done = raymeld("merge", *words, "--address", "inline", "--quiet", cwd=tmp_path)

    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def package_of_the_user(directory: Path) -> None:
    (directory / "cluster").mkdir()
    (directory / "cluster" / "__init__.py").write_text("raise RuntimeError('not ours')")


def test_ray_started_for_a_merge_leaves_nothing_and_ignores_a_users_package_called_cluster(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    package_of_the_user(tmp_path)

    done = raymeld("merge", base, adapter, "--out", "out", "--workers", 1, cwd=tmp_path)

    assert done.returncode == 0, done.stderr
    assert_same_tensors(read_tensors(tmp_path / "out"), oracle(base, adapter))
    assert {path.name for path in tmp_path.iterdir()} == {"cluster", "out"}  # HOME is here too
    until(lambda: not processes_of(tmp_path))  # Ray's agents notice that its raylet is gone


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_merge_publishes_nothing_and_ends_its_ray(
    base: Path, adapter: Path, tmp_path: Path, number: signal.Signals
) -> None:
    command = [str(Path(sys.executable).with_name("raymeld")), "merge", str(base), str(adapter)]
    process = subprocess.Popen(
        [*command, "--out", "out"],
        cwd=tmp_path,
        env=environment(tmp_path),
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    lines = iter(process.stderr.readline, "")
    assert any(line.startswith("workers: at most 1") for line in lines)  # Ray is up, they are not
    process.send_signal(number)
    _, rest = process.communicate(timeout=60)

    assert process.returncode == 130, rest
    assert "error: interrupted. " in rest
    assert rest.splitlines()[-1] == f"  raymeld merge {base} {adapter} --out out"  # to go on
    assert not (tmp_path / "out" / "config.json").exists()
    until(lambda: not processes_of(tmp_path))  # Ray's agents notice that its raylet is gone


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_merge_that_is_interrupted_while_ray_starts_leaves_no_ray(
    base: Path, adapter: Path, tmp_path: Path, number: signal.Signals
) -> None:
    command = [str(Path(sys.executable).with_name("raymeld")), "merge", str(base), str(adapter)]
    process = subprocess.Popen(
        [*command, "--out", "out"],
        cwd=tmp_path,
        env=environment(tmp_path),
        stderr=subprocess.PIPE,
        text=True,
    )
    children = psutil.Process(process.pid).children
    while not any("gcs_server" in child.name() for child in children()):
        assert process.poll() is None
    process.send_signal(number)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)

    assert process.returncode == 130, said
    assert "error: interrupted" in said
    assert not (tmp_path / "out").exists()
    until(lambda: not processes_of(tmp_path))  # Ray's agents notice that its raylet is gone


def test_an_address_where_nobody_listens_is_told_at_once(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    done = raymeld("merge", base, adapter, "--out", "out", "--address", address, cwd=tmp_path)

    assert done.returncode == 1
    assert f"error: --address {address}: cannot connect" in done.stderr
    assert list(tmp_path.iterdir()) == []


FINISHED = 'exec "$0" merge "$1" "$2" --out out --address inline --quiet'


@pytest.mark.parametrize(
    ("where", "code", "said"),
    [
        ("| true", 0, ""),
        (">&-", 0, ""),
        ("> /dev/full", 1, "what was asked for is done, but its answer cannot be written"),
    ],
)
def test_a_merge_is_done_whether_or_not_its_answer_can_be_written(
    base: Path, adapter: Path, tmp_path: Path, where: str, code: int, said: str
) -> None:
    script = f"set -o pipefail; ({FINISHED}) {where}"
    raymeld_itself = Path(sys.executable).with_name("raymeld")
    done = subprocess.run(
        ["bash", "-c", script, raymeld_itself, base, adapter],
        cwd=tmp_path,
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        check=False,
    )

    assert (tmp_path / "out" / "config.json").exists()
    assert done.returncode == code, done.stderr
    assert said in done.stderr
    assert bool(said) == bool(done.stderr)


def test_a_directory_that_was_deleted_is_refused(base: Path, adapter: Path, tmp_path: Path) -> None:
    script = 'mkdir gone; cd gone; rmdir ../gone; exec "$0" merge "$1" "$2" --out "$3"'
    words = [Path(sys.executable).with_name("raymeld"), base, adapter, tmp_path / "out"]
    done = subprocess.run(
        ["bash", "-c", script, *words], cwd=tmp_path, capture_output=True, text=True, check=False
    )

    assert done.returncode == 2
    assert "this directory was deleted" in done.stderr


def test_a_session_restores_the_environment() -> None:
    before = dict(os.environ)

    with session("local", use_gpus=False):
        assert os.environ["RAY_AUTH_TOKEN"] != before.get("RAY_AUTH_TOKEN")

    assert dict(os.environ) == before

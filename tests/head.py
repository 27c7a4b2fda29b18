"""A real Ray head with dashboard and token, in a directory and on ports of its own."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from actors.identity import PACKAGES

BIN = Path(sys.executable).parent
ROOT = Path(__file__).resolve().parent.parent


def until(condition: Callable[[], object], seconds: float = 60, what: str = "") -> None:
    """Wait until ``condition`` holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what or condition}"
        time.sleep(0.02)


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """The running head, as a client sees it."""

    address: str
    home: Path
    """Holds the token."""

    def environment(self, **more: str) -> dict[str, str]:
        """For a client, or a head, that knows the token and nothing else of any Ray."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        path = f"{BIN}{os.pathsep}{kept['PATH']}"
        return {**kept, "HOME": str(self.home), "PATH": path, **more}

    def raymeld(self, *words: object, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run a command to its end."""
        return subprocess.run(
            [BIN / "raymeld", *map(str, words)],
            env=self.environment(RAY_API_SERVER_ADDRESS=self.address, **environment),
            cwd=self.home,
            capture_output=True,
            text=True,
            timeout=120,
        )

    def submit_changed_code(
        self, checkout: Path, *words: object
    ) -> subprocess.CompletedProcess[str]:
        """Submit from a copy of this checkout that differs in the words of an error."""
        for package in PACKAGES:
            shutil.copytree(ROOT / package, checkout / package)
        errors = checkout / "merge_core" / "errors.py"
        text = errors.read_text()
        errors.write_text(text.replace("{self.where}: {self.what}", "changed: {self.what}"))
        command = [sys.executable, "-m", "cluster.cli", "submit", "--address", self.address]
        return subprocess.run(
            [*command, *map(str, words)],
            cwd=checkout,
            env=self.environment(),
            capture_output=True,
            text=True,
            timeout=120,
        )

    @contextlib.contextmanager
    def started(self, *words: object, address: str = "") -> Iterator[Command]:
        """A command that runs while inside."""
        out, err = (Path(tempfile.mktemp(suffix=".txt", dir=self.home)) for _ in range(2))
        with out.open("wb") as stdout, err.open("wb") as stderr:
            process = subprocess.Popen(
                [BIN / "raymeld", *map(str, words)],
                env=self.environment(RAY_API_SERVER_ADDRESS=address or self.address),
                cwd=self.home,
                stdout=stdout,
                stderr=stderr,
            )
        try:
            yield Command(process, out, err)
        finally:
            process.kill()
            process.wait()


@dataclass(frozen=True, slots=True)
class Command:
    """A command under way."""

    process: subprocess.Popen[bytes]
    stdout_file: Path
    stderr_file: Path

    @property
    def stdout(self) -> str:
        return self.stdout_file.read_text()

    @property
    def stderr(self) -> str:
        return self.stderr_file.read_text()

    def until_stdout(self, text: str) -> None:
        """Wait until ``text`` was printed."""
        until(lambda: text in self.stdout or self._over(text), what=f"{text!r} on stdout")

    def until_stderr(self, text: str) -> None:
        """Wait until ``text`` was said."""
        until(lambda: text in self.stderr or self._over(text), what=f"{text!r} on stderr")

    def _over(self, text: str) -> bool:
        assert self.process.poll() is None, f"ended before {text!r}: {self.stdout}{self.stderr}"
        return False


def name_in(text: str) -> str:
    match = re.search(r"raymeld-[0-9a-f]{12}-\d+", text)
    assert match is not None, text
    return match[0]


def driver_of(job: str) -> psutil.Process:
    """The driver of a job; its shell has the same environment, but other words."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            config = process.environ().get("RAY_JOB_CONFIG_JSON_ENV_VAR", "")
            if job in config and "-P" in process.cmdline():
                return process
    raise AssertionError(job)


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@contextlib.contextmanager
def running_head() -> Iterator[Head]:
    """Start a head on loopback; at the end every process of it is killed, and of it alone."""
    where = Path(tempfile.mkdtemp(prefix="rm-", dir="/tmp"))  # sockets want a short path
    gcs, dashboard, *others = free_ports(6)
    head = Head(address=f"http://127.0.0.1:{dashboard}", home=where / "home")
    (head.home / ".ray").mkdir(parents=True)
    (head.home / ".ray" / "auth_token").write_text(secrets.token_hex(32))
    names = "ray-client-server", "dashboard-agent-listen", "dashboard-agent-grpc", "metrics-export"
    command = [
        *(
            BIN / "ray",
            "start",
            "--head",
            "--block",
            f"--port={gcs}",
            "--num-cpus=2",
            "--num-gpus=1",
        ),
        *(
            "--dashboard-host=127.0.0.1",
            f"--dashboard-port={dashboard}",
            f"--temp-dir={where / 't'}",
        ),
        *(f"--{name}-port={port}" for name, port in zip(names, others, strict=True)),
        *("--min-worker-port=0", "--max-worker-port=0", "--object-store-memory=100000000"),
        "--disable-usage-stats",
    ]
    said = where / "said.txt"
    with said.open("wb") as out:
        process = subprocess.Popen(
            command,
            env=head.environment(RAY_AUTH_MODE="token"),
            cwd=where,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    try:
        until(lambda: "Ray runtime started" in said.read_text() or process.poll() is not None)
        assert process.poll() is None, said.read_text()
        yield head
    finally:
        _kill(process)
        shutil.rmtree(where)


def _kill(head: subprocess.Popen[bytes]) -> None:
    processes = psutil.Process(head.pid).children(recursive=True)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(head.pid, signal.SIGKILL)
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    head.wait()
    psutil.wait_procs(processes, timeout=10)

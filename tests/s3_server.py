"""A real S3 on this machine: OpenStack Swift with its S3 API, from PyPI, in a venv of its own."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterator
from pathlib import Path

from fault_proxy import How
from network_faults import say

from merge_core.stores.location import Location
from merge_core.stores.s3_client import client_for

HERE = Path(__file__).parent
REQUIREMENTS = HERE / "swift_requirements.txt"
VENV = Path(sys.prefix) / "swift"
"""In the tests' own, which ``make setup`` makes anew."""

KEY, SECRET, TOKEN = "test:tester", "testing", "token-that-nobody-may-see"
"""Swift does not look at the token; but it is sent, so it can be looked for."""

ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": KEY,
    "AWS_SECRET_ACCESS_KEY": SECRET,
    "AWS_SESSION_TOKEN": TOKEN,
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_CONFIG_FILE": os.devnull,
    "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
}


@contextlib.contextmanager
def s3_server() -> Iterator[str]:
    """The address of a server that holds nothing yet, and is gone at the end."""
    python = _installed()
    with tempfile.TemporaryDirectory(prefix="swift-") as directory:
        command = [python, "-W", "ignore", HERE / "swift_process.py", directory]
        environment = {"PATH": os.environ["PATH"]}
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        ) as server:
            assert server.stdin is not None
            assert server.stdout is not None
            address = server.stdout.readline().strip()
            assert address.startswith("http://"), f"Swift ended with {server.wait()}"
            yield address
            server.stdin.close()


def _installed() -> Path:
    """Its Python. Installed by the first who asks, which takes some ten seconds."""
    done, wanted = VENV / "installed.txt", REQUIREMENTS.read_text()
    with open(f"{VENV}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists() or done.read_text() != wanted:
            shutil.rmtree(VENV, ignore_errors=True)
            venv.create(VENV, with_pip=True)
            install = [VENV / "bin" / "python", "-m", "pip", "install", "--quiet", "--no-deps"]
            subprocess.run([*install, "--requirement", REQUIREMENTS], check=True)
            done.write_text(wanted)
    return VENV / "bin" / "python"


def uploads(location: Location) -> list[str]:
    """Keys of all multipart uploads under way in a bucket."""
    found = client_for(location.access).list_multipart_uploads(Bucket=location.root)
    return [upload["Key"] for upload in found.get("Uploads", ())]


def refusal(status: int, code: str, message: str = "no") -> How:
    """S3 answers so."""
    return say(status, f"<Error><Code>{code}</Code><Message>{message}</Message></Error>".encode())

"""A Ray session: one that this process starts for itself, or a cluster that is there already."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import secrets
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from merge_core.errors import RaymeldError

LOCAL = "local"
"""The address that means: a Ray of our own, on this machine only, gone at the end."""

OBJECT_STORE_BYTES = 128 << 20
"""Only plans and receipts pass Ray; the default would reserve a third of the machine."""


@contextlib.contextmanager
def session(address: str, *, use_gpus: bool) -> Iterator[None]:
    """Connect to the cluster at ``address``, or start Ray in this process for ``local``.

    A Ray of our own writes nothing into the home directory, reports no usage, shows no dashboard,
    and takes its token and its files with it when it ends. The environment is restored.

    Raises:
        RaymeldError: the cluster cannot be reached, or Ray does not start.
    """
    before = dict(os.environ)  # importing Ray changes it already
    import ray

    if ray.is_initialized():
        remedy = "Call ray.shutdown() first, or merge inline."
        raise RaymeldError("this process is connected to a Ray already", "ray", remedy)
    scratch = Path(tempfile.mkdtemp(prefix="raymeld-", dir=_short_temporary_directory()))
    try:
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        if address == LOCAL:
            # An explicit token keeps Ray from writing one to ~/.ray; without any token its ports
            # would be open to everybody on this network.
            os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
            os.environ.pop("RAY_ADDRESS", None)
        else:
            _use_token_if_there_is_one()
        _reload_authentication()
        with contextlib.chdir(_neutral_directory(scratch)), _own_sigterm():
            _connect(ray, address, scratch, use_gpus=use_gpus)
        yield
    finally:
        ray.shutdown()
        shutil.rmtree(scratch, ignore_errors=True)
        _restore_environment(before)
        _reload_authentication()


def _restore_environment(before: dict[str, str]) -> None:
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    for name, value in before.items():
        if os.environ.get(name) != value:
            os.environ[name] = value


def _connect(ray: Any, address: str, scratch: Path, *, use_gpus: bool) -> None:
    own = {
        "include_dashboard": False,
        "object_store_memory": OBJECT_STORE_BYTES,
        "_temp_dir": str(scratch),
        **({} if use_gpus else {"num_gpus": 0}),
    }
    try:
        ray.init(
            address=address,
            namespace="raymeld",
            log_to_driver=False,
            logging_level="error",
            **(own if address == LOCAL else {}),
        )
    except Exception as error:
        raise RaymeldError(
            f"cannot connect: {str(error).strip().splitlines()[0]}",
            f"--address {address}",
            "Is the cluster up, and RAY_AUTH_TOKEN set if it asks for one?"
            " --address inline merges without Ray.",
        ) from error


@contextlib.contextmanager
def _own_sigterm() -> Iterator[None]:
    """Keep the caller's SIGTERM handler: ray.init puts one in its place that exits at once."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        _put_back(handler)


def _put_back(handler: Any) -> None:
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)


def _reload_authentication() -> None:
    """Have Ray read RAY_AUTH_MODE and the token again: it does so only once, when it is imported.

    Ray's own command line calls the same two functions; there is no public one.
    """
    from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


def _use_token_if_there_is_one() -> None:
    """Ray sends the token to an explicit address only when it is told to."""
    token = Path("~/.ray/auth_token").expanduser()
    if "RAY_AUTH_MODE" not in os.environ and (
        os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH") or token.exists()
    ):
        os.environ["RAY_AUTH_MODE"] = "token"


def _neutral_directory(scratch: Path) -> Path:
    """A working directory for Ray's workers in which no package shadows ours.

    Ray puts it first on their path. Where raymeld is installed, any empty directory does; from a
    plain checkout the workers need the checkout itself.
    """
    root = Path(__file__).resolve().parent.parent
    found = importlib.metadata.distributions(name="raymeld")
    installed = any(Path(str(dist.locate_file(""))).resolve() != root for dist in found)
    return scratch if installed else root


def _short_temporary_directory() -> str:
    """Where Ray may put its sockets: a socket's path may not exceed 107 bytes."""
    usual = tempfile.gettempdir()
    return usual if len(usual) < 20 or sys.platform == "darwin" else "/tmp"  # noqa: S108

"""A Ray session: one that this process starts for itself, or a cluster that is there already."""

from __future__ import annotations

import atexit
import contextlib
import importlib.metadata
import os
import secrets
import signal
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from cluster.authentication import (
    HOST_AND_PORT,
    borrowed_environment,
    choose_authentication,
    reload_authentication,
)
from cluster.log_lines import logs_json
from cluster.scratch import scratch_directory
from merge_core.errors import RaymeldError

LOCAL = "local"
"""The address that means: a Ray of our own, on this machine only, gone at the end."""

CONNECT_SECONDS = 10.0
"""For a first answer of a cluster's head; one that is far away takes a tenth of a second."""

LEAVE_SECONDS = 10.0
"""For taking leave of a cluster, which takes a tenth of a second while its head answers. Without a
head Ray may try for a minute, and then ends the process without a word."""

LEFT_SECONDS = 120.0
"""For an earlier leave that is still under way, where the next session begins: on a busy machine
the end of Ray's metrics has taken more than 20 s."""

_leaving: list[threading.Thread] = []
"""Those that are still at it."""

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
    with borrowed_environment(), contextlib.ExitStack() as ending:
        import ray

        if ray.is_initialized():
            remedy = "Call ray.shutdown() first, or merge inline."
            raise RaymeldError("this process is connected to a Ray already", "ray", remedy)
        # Alive until the end: Linux takes the end of the thread that started them as the death of
        # the parent, of which Ray's processes die.
        starter = ThreadPoolExecutor(1)
        scratch = ending.enter_context(scratch_directory())
        try:
            os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
            if address == LOCAL:
                # An explicit token keeps Ray from writing one to ~/.ray; without any token its
                # ports would be open to everybody on this network.
                os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
                os.environ.pop("RAY_ADDRESS", None)
            else:
                _refuse_silence(address)
                choose_authentication(address)
            reload_authentication()
            with contextlib.chdir(_neutral_directory(scratch)):
                _connect(starter, ray, address, scratch, use_gpus=use_gpus)
            with _off_stdout(ray):
                yield
        finally:
            with _uninterrupted():
                _disconnect(ray, address)
                starter.shutdown()
                ending.close()


def _connect(starter: Executor, ray: Any, address: str, scratch: Path, *, use_gpus: bool) -> None:
    """Call ``ray.init`` in the thread of ``starter``, and wait for it whatever happens.

    In the main thread Ray would replace our SIGTERM handler with one that exits at once, and a
    Ctrl-C would leave half a Ray, which nothing can stop.
    """
    own = {
        "include_dashboard": False,
        "object_store_memory": OBJECT_STORE_BYTES,
        "_temp_dir": str(scratch),
        **({} if use_gpus else {"num_gpus": 0}),
    }
    options = {
        "address": address,
        "namespace": "raymeld",
        "log_to_driver": False,
        "logging_level": "error",
        **(own if address == LOCAL else {}),
        **({"job_config": _json_logs_in_workers()} if logs_json() else {}),
    }
    _wait_for_leaving()
    started = starter.submit(ray.init, **options)
    try:
        started.result()
    except KeyboardInterrupt:
        with _uninterrupted():
            wait([started])
        raise
    except Exception as error:
        raise _unreachable(address, str(error).strip().splitlines()[0]) from error


def _wait_for_leaving() -> None:
    """Let an earlier shutdown end: it would end what begins now, and Ray the process with it.

    Raises:
        RaymeldError: it does not end.
    """
    for leaving in list(_leaving):
        leaving.join(LEFT_SECONDS)
        if leaving.is_alive():
            what = "the Ray that this process was connected to before does not come to its end"
            raise RaymeldError(what, "ray", "Start the merge in a process of its own")
        _leaving.remove(leaving)


def _disconnect(ray: Any, address: str) -> None:
    """End a Ray of our own, or take leave of a cluster, be it dead."""
    if address == LOCAL:
        ray.shutdown()
        return
    leaving = threading.Thread(target=ray.shutdown, daemon=True)
    leaving.start()
    leaving.join(LEAVE_SECONDS)
    if leaving.is_alive():
        _leaving.append(leaving)
        # Or Ray would wait for that thread when Python exits
        atexit.unregister(ray._private.worker.shutdown)  # noqa: SLF001 - there is no public way


def _json_logs_in_workers() -> Any:
    """Ray's own form of JSON lines, with its ids, for whatever a worker's process logs.

    Not as ``logging_config`` of ``ray.init``: that would have Ray log to stderr here, too.
    """
    import ray

    config = ray.job_config.JobConfig()
    config.set_py_logging_config(ray.LoggingConfig(encoding="JSON"))
    return config


@contextlib.contextmanager
def _off_stdout(ray: Any) -> Iterator[None]:
    """Keep Ray's messages off stdout, where nothing but the answer belongs.

    Whatever ``log_to_driver`` says, the death of any node prints twenty lines there, and makes two
    documents of ``--json``. Ray's logs have them all; what they mean for the merge, the pool says.
    """
    worker = ray._private.worker  # noqa: SLF001 - there is no public way
    before = worker.print_to_stdstream
    worker.print_to_stdstream = lambda *_, **__: None
    try:
        yield
    finally:
        worker.print_to_stdstream = before


def _unreachable(address: str, reason: str) -> RaymeldError:
    return RaymeldError(
        f"cannot connect: {reason}",
        f"--address {address}",
        "Is the cluster up, and RAY_AUTH_TOKEN set if it asks for one?"
        " --address inline merges without Ray.",
    )


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Let nobody stop the stopping: a second Ctrl-C would leave Ray's processes behind.

    With a handler that does nothing: processes that Ray starts meanwhile would inherit SIG_IGN,
    and could not be stopped either.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, lambda *_: None)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _refuse_silence(address: str) -> None:
    """Ray itself tries for a quarter of an hour where nobody listens.

    Raises:
        RaymeldError: nobody does.
    """
    place = HOST_AND_PORT.fullmatch(address)
    if place is None:
        return
    try:
        socket.create_connection((place["host"], int(place["port"])), CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise _unreachable(address, str(error)) from error


def _neutral_directory(scratch: Path) -> Path:
    """A working directory for Ray's workers in which no package shadows ours.

    Ray puts it first on their path. Where raymeld is installed, any empty directory does; from a
    plain checkout the workers need the checkout itself.
    """
    root = Path(__file__).resolve().parent.parent
    found = importlib.metadata.distributions(name="raymeld")
    installed = any(Path(str(dist.locate_file(""))).resolve() != root for dist in found)
    return scratch if installed else root

"""OpenStack Swift with its S3 API, all four servers in one process. Run by the Python of its venv.

    python swift_process.py DIRECTORY

Prints the address once it answers, and ends when its standard input does: so it cannot outlive the
tests, however they end.
"""

# ruff: noqa: E402 - eventlet patches before anything else is imported
from __future__ import annotations

import eventlet
import eventlet.wsgi

eventlet.monkey_patch()

import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from swift.common.ring import RingBuilder
from swift.common.utils import NullLogger, set_swift_dir
from swift.common.wsgi import SwiftHttpProtocol, loadapp

App = Callable[[dict[str, Any], Any], Iterable[bytes]]

FILTERS = ("catch_errors", "gatekeeper", "healthcheck", "s3api", "tempauth", "bulk", "copy", "slo")

HASHES = """
[swift-hash]
swift_hash_path_suffix = s
swift_hash_path_prefix = p
[storage-policy:0]
name = one
default = yes
"""

SERVER = """
[DEFAULT]
swift_dir = {etc}
devices = {devices}
mount_check = false
fallocate_reserve = 0
[pipeline:main]
pipeline = {pipeline}
[app:{kind}-server]
use = egg:swift#{kind}
"""

PROXY = """
allow_account_management = true
account_autocreate = true
object_chunk_size = 1048576
client_chunk_size = 1048576
"""

S3API = """
s3_acl = no
check_bucket_owner = no
allow_no_owner = true
max_upload_part_num = 10000
min_segment_size = 1
"""

OPTIONS = {"tempauth": "user_test_tester = testing .admin\n", "s3api": S3API}


def main() -> None:
    """Serve until standard input ends."""
    directory = Path(sys.argv[1])
    etc, devices = directory / "etc", directory / "devices"
    (devices / "d1").mkdir(parents=True)
    etc.mkdir()
    (etc / "swift.conf").write_text(HASHES)
    set_swift_dir(str(etc))
    sockets = {kind: _listen() for kind in ("account", "container", "object", "proxy")}
    for kind in ("account", "container", "object"):
        _write_ring(etc / f"{kind}.ring.gz", sockets[kind].getsockname()[1])
    for kind, listening in sockets.items():
        (etc / f"{kind}.conf").write_text(_config(kind, etc, devices))
        app = loadapp(str(etc / f"{kind}.conf"), {"log_name": kind})
        _serve(listening, _atomic(app) if kind == "proxy" else app)
    print(f"http://127.0.0.1:{sockets['proxy'].getsockname()[1]}", flush=True)
    while eventlet.tpool.execute(sys.stdin.read):
        pass
    os._exit(0)


def _listen() -> eventlet.greenio.GreenSocket:
    return eventlet.listen(("127.0.0.1", 0), backlog=256)


def _write_ring(path: Path, port: int) -> None:
    """One copy of everything on the one device."""
    builder = RingBuilder(2, 1, 0)
    here = {"ip": "127.0.0.1", "port": port, "region": 1, "zone": 1, "device": "d1", "weight": 1}
    builder.add_dev(here)
    builder.rebalance()
    builder.get_ring().save(str(path))


def _config(kind: str, etc: Path, devices: Path) -> str:
    filters = FILTERS if kind == "proxy" else ()
    pipeline = " ".join((*filters, f"{kind}-server"))
    text = SERVER.format(etc=etc, devices=devices, kind=kind, pipeline=pipeline)
    sections = [
        f"[filter:{name}]\nuse = egg:swift#{name}\n{OPTIONS.get(name, '')}" for name in filters
    ]
    return text + (PROXY if filters else "") + "\n".join(sections)


def _atomic(app: App) -> App:
    """Swift looks whether an object is there before it takes the new one; S3 does both at once."""
    one_at_a_time = eventlet.semaphore.Semaphore()

    def answer(request: dict[str, Any], start: Any) -> Iterable[bytes]:
        if "HTTP_IF_NONE_MATCH" not in request:
            return app(request, start)
        with one_at_a_time:
            return list(app(request, start))

    return answer


def _serve(listening: eventlet.greenio.GreenSocket, app: App) -> None:
    warnings.filterwarnings("ignore", message="capitalize_response_headers is disabled")
    eventlet.spawn(
        eventlet.wsgi.server,
        listening,
        app,
        NullLogger(),
        protocol=SwiftHttpProtocol,
        capitalize_response_headers=False,  # clients of S3 want an ETag, not an Etag
    )


if __name__ == "__main__":
    logging.disable(logging.CRITICAL)
    main()

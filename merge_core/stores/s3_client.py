"""Clients of S3, one a process for each way to reach it, with botocore's own credentials.

AWS_PROFILE, AWS_ACCESS_KEY_ID, ~/.aws, an instance's or a pod's role: whatever the AWS command line
finds is found. Nothing of that is kept here.
"""

from __future__ import annotations

import base64
import logging
import os
import threading
import zlib
from typing import Any
from urllib.parse import urlsplit

import botocore.session
from botocore import UNSIGNED
from botocore.config import Config

from merge_core.errors import refuse
from merge_core.stores.location import Access
from merge_core.stores.s3_retries import Persistence

CONNECT_SECONDS = 15
"""Also the time that a part has to be sent without TLS: half a MB/s for one of 8 MiB."""

STALL_SECONDS = 25
"""Without a byte of an answer before it is asked for again. S3 itself keeps long answers alive."""

CONNECTIONS = 64
"""Kept open: more than any number of lanes that read and write at the same time."""

_clients: dict[Access, Any] = {}
_lock = threading.Lock()


def client_for(access: Access) -> Any:
    """The process's client for ``access``; threads may share it.

    Raises:
        InputError: the endpoint holds credentials, or is none.
        botocore.exceptions.BotoCoreError: no such profile, a broken config file, and so on.
    """
    with _lock:
        if access not in _clients:
            _clients[access] = _make_client(access)
        return _clients[access]


def checksum_of(data: bytes | bytearray, client: Any) -> dict[str, str]:
    """What has the server check that ``data`` arrived, for PutObject and UploadPart.

    In a header of its own: the trailers that botocore would send over TLS are not understood by
    every server. ``AWS_REQUEST_CHECKSUM_CALCULATION=when_required`` leaves it out.
    """
    if not sends_checksums(client):
        return {}
    return {"ChecksumCRC32": base64.b64encode(zlib.crc32(data).to_bytes(4, "big")).decode()}


def sends_checksums(client: Any) -> bool:
    """Whether uploads carry checksums."""
    return bool(client.meta.config.request_checksum_calculation == "when_supported")


def _make_client(access: Access) -> Any:
    _keep_requests_out_of_logs()
    _refuse_secrets(access.endpoint_url)
    _refuse_odd(access.endpoint_url)
    session = botocore.session.get_session()
    style = session.get_scoped_config().get("s3", {}).get("addressing_style")
    if style is None and access.endpoint_url is not None:
        style = "path"  # few other servers have a host for each bucket
    client = _create(session, access, style)
    if style is None and "amazonaws.com" not in client.meta.endpoint_url:  # by AWS_ENDPOINT_URL
        client = _create(session, access, "path")
    return client


def _create(session: Any, access: Access, style: str | None) -> Any:
    # A checksum in the signed headers proves the body already; its sha256 would cost more than it.
    checked = session.get_config_variable("request_checksum_calculation") != "when_required"
    options = {"payload_signing_enabled": False} if checked else {}
    config = Config(
        retries={"mode": "standard", "total_max_attempts": 1},  # the others are ours
        connect_timeout=CONNECT_SECONDS,
        read_timeout=STALL_SECONDS,
        max_pool_connections=CONNECTIONS,
        response_checksum_validation="when_required",  # ranges have none
        signature_version=UNSIGNED if access.anonymous else None,
        s3={**options, "addressing_style": style} if style else options,
    )
    region = access.region or os.environ.get("AWS_REGION")  # which botocore alone does not know
    client = session.create_client(
        "s3", region_name=region, endpoint_url=access.endpoint_url, config=config
    )
    client.meta.events.register("needs-retry.s3", Persistence().pause)
    return client


def _keep_requests_out_of_logs() -> None:
    """At DEBUG botocore logs every header, and a session's token is one of them."""
    for name in ("botocore", "urllib3"):
        logger = logging.getLogger(name)
        if logger.level == logging.NOTSET:
            logger.setLevel(logging.INFO)


def _refuse_odd(endpoint: str | None) -> None:
    if endpoint is not None and urlsplit(endpoint).scheme not in ("http", "https"):
        remedy = "Write it with http:// or https:// in front"
        raise refuse("is no address of a server", f"--endpoint-url {endpoint}", remedy)


def _refuse_secrets(endpoint: str | None) -> None:
    if endpoint is not None and "@" in urlsplit(endpoint).netloc:
        host = urlsplit(endpoint).netloc.rpartition("@")[2]
        remedy = "Leave them to the environment: AWS_PROFILE, AWS_ACCESS_KEY_ID, an instance's role"
        raise refuse("the endpoint's URL holds credentials", host, remedy)

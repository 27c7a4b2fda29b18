"""What a cloud tells a spot machine about itself: whether it is about to be taken back.

AWS and GCP answer at the same link-local address, each in its own way, and only to the machine
itself. Both documentations say that a notice comes at best effort: a machine can also just vanish.
"""

from __future__ import annotations

import http.client
import json
import time
import urllib.parse
from dataclasses import dataclass
from datetime import datetime
from email.message import Message
from http import HTTPStatus
from typing import Protocol

from merge_core.errors import RaymeldError

METADATA_URL = "http://169.254.169.254"
"""Link-local: answered by the hypervisor, on AWS and GCP alike."""

ANSWER_SECONDS = 2.0
"""How long an answer may take; it comes from the same host, within milliseconds."""

AWS_TOKEN_SECONDS = 21600
"""The longest life that AWS gives a token."""

GCP_NOTICE_SECONDS = 30.0
"""From the notice of GCP, which names no time, to the end."""


class MetadataError(RaymeldError):
    """The metadata service did not answer, or not as its documentation says."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Notice:
    """The cloud takes this machine back."""

    cloud: str
    action: str
    """``terminate``, ``stop`` or ``hibernate``."""
    end: float
    """When, in seconds since the epoch."""


class Cloud(Protocol):
    """The metadata service of one cloud."""

    name: str

    def answers(self) -> bool:
        """Whether this machine is in this cloud.

        Raises:
            MetadataError: nothing answers.
        """

    def notice(self) -> Notice | None:
        """The notice, if there is one.

        Raises:
            MetadataError: no answer, or none that could be understood.
        """


class Aws:
    """The instance metadata service of AWS, version 2: every question needs a token."""

    name = "AWS"

    def __init__(self, url: str = METADATA_URL) -> None:
        self._url, self._token = url, ""

    def answers(self) -> bool:
        """Whether a token is to be had; see ``Cloud``."""
        answer = self._ask_for_token()
        self._token = answer.body.strip()
        return answer.status == HTTPStatus.OK

    def notice(self) -> Notice | None:
        """See ``Cloud``. A token that has run out is replaced on the way."""
        answer = self._instance_action()
        if answer.status == HTTPStatus.UNAUTHORIZED:
            token = self._ask_for_token()
            if token.status != HTTPStatus.OK:
                raise MetadataError(f"no new token: HTTP status {token.status}", self._url)
            self._token = token.body.strip()
            answer = self._instance_action()
        if answer.status == HTTPStatus.NOT_FOUND:
            return None
        if answer.status != HTTPStatus.OK:
            raise MetadataError(f"HTTP status {answer.status}", self._url)
        try:
            said = json.loads(answer.body)
            end = datetime.fromisoformat(said["time"]).timestamp()
            return Notice(cloud=self.name, action=str(said["action"]), end=end)
        except (ValueError, KeyError, TypeError) as error:
            raise MetadataError(f"no notice: {answer.body[:80]!r}", self._url) from error

    def _instance_action(self) -> _Answer:
        return _ask(
            f"{self._url}/latest/meta-data/spot/instance-action",
            headers={"X-aws-ec2-metadata-token": self._token},
        )

    def _ask_for_token(self) -> _Answer:
        return _ask(
            f"{self._url}/latest/api/token",
            method="PUT",
            headers={"X-aws-ec2-metadata-token-ttl-seconds": str(AWS_TOKEN_SECONDS)},
        )


class Gcp:
    """The metadata server of GCP."""

    name = "GCP"

    def __init__(self, url: str = METADATA_URL) -> None:
        self._url = url

    def answers(self) -> bool:
        """Whether the server names itself; see ``Cloud``."""
        return self._preempted().headers.get("Metadata-Flavor") == "Google"

    def notice(self) -> Notice | None:
        """See ``Cloud``."""
        answer = self._preempted()
        if answer.status != HTTPStatus.OK:
            raise MetadataError(f"HTTP status {answer.status}", self._url)
        said = answer.body.strip().upper()
        if said == "FALSE":
            return None
        if said == "TRUE":
            end = time.time() + GCP_NOTICE_SECONDS
            return Notice(cloud=self.name, action="terminate", end=end)
        raise MetadataError(f"neither TRUE nor FALSE: {answer.body[:80]!r}", self._url)

    def _preempted(self) -> _Answer:
        path = "/computeMetadata/v1/instance/preempted"
        return _ask(self._url + path, headers={"Metadata-Flavor": "Google"})


def find_cloud(url: str = METADATA_URL, *, attempts: int = 3, pause: float = 1.0) -> Cloud | None:
    """The cloud that this machine is in; None where no known metadata service answers.

    Args:
        attempts: how often to ask before None, since the service may still be starting.
        pause: seconds between them.
    """
    for attempt in range(attempts):
        if attempt:
            time.sleep(pause)
        for cloud in (Gcp(url), Aws(url)):
            try:
                if cloud.answers():
                    return cloud
            except MetadataError:
                continue
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Answer:
    status: int
    headers: Message
    body: str


def _ask(url: str, *, headers: dict[str, str], method: str = "GET") -> _Answer:
    """One request, past every proxy: what a proxy could reach is not this machine's."""
    parts = urllib.parse.urlsplit(url)
    connection = http.client.HTTPConnection(parts.netloc, timeout=ANSWER_SECONDS)
    try:
        connection.request(method, parts.path, headers=headers)
        reply = connection.getresponse()
        body = reply.read(1 << 16).decode(errors="replace")
    except (OSError, http.client.HTTPException) as error:
        raise MetadataError(f"no answer: {str(error) or type(error).__name__}", url) from error
    finally:
        connection.close()
    return _Answer(status=reply.status, headers=reply.headers, body=body)

"""Requests to the Hugging Face hub, through huggingface_hub's own session, each tried again.

The session brings proxies, certificates and the token that huggingface_hub finds. Its own calls
wait without end for an answer that stalls, so what a merge asks for is asked for here.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar
from urllib.parse import parse_qsl, quote, urlsplit

from huggingface_hub import constants, get_session, hf_raise_for_status
from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

from merge_core import __version__
from merge_core.errors import StorageError
from merge_core.stores.hub_errors import HTTP_ERROR, HubPlace, endpoint, told
from merge_core.stores.retries import Retries, asked_by

PASSING = frozenset({408, 429, 500, 502, 503, 504})
"""Statuses that pass by themselves."""

_RESET = re.compile(r";\s*t\s*=\s*(\d+)")
"""Seconds until the hub counts requests anew, in its RateLimit header."""

_T = TypeVar("_T")

for _name in ("httpx", "httpx2"):  # at INFO they log each address: signed ones open private files
    if (_logger := logging.getLogger(_name)).level == logging.NOTSET:
        _logger.setLevel(logging.WARNING)


class PassingError(Exception):
    """A failure that may pass by itself.

    Args:
        what: in words.
        asked: seconds after which the server wants to be asked again.
    """

    def __init__(self, what: str, asked: float = 0.0) -> None:
        super().__init__(what)
        self.asked = asked


def timeout() -> float:
    """Seconds without any answer after which a request has failed: HF_HUB_DOWNLOAD_TIMEOUT."""
    return float(constants.HF_HUB_DOWNLOAD_TIMEOUT)


def own_headers() -> dict[str, str]:
    """For the hub itself, the token included: never for whoever it refers to."""
    headers: dict[str, str] = build_hf_headers(library_name="raymeld", library_version=__version__)
    return headers


def persistently(attempt: Callable[[], _T], place: HubPlace, retries: Retries) -> _T:
    """What ``attempt`` returns, however often that takes, within bounds.

    Raises:
        StorageError: it failed for good, or each time.
    """
    for failed in range(1, retries.attempts + 1):
        try:
            with told(place):
                try:
                    return attempt()
                except HTTP_ERROR as error:
                    if hasattr(error, "response"):  # the hub has spoken
                        raise
                    raise PassingError(f"no answer ({type(error).__name__})") from None
        except PassingError as error:
            if failed == retries.attempts:
                what = f"{error}, {failed} times in a row"
                remedy = "Try again later, or name a mirror in HF_ENDPOINT"
                raise StorageError(what, str(place), remedy) from None
            retries.pause(failed, error.asked)
    raise AssertionError("no attempt was allowed")


def check_status(response: Any) -> None:
    """Raise what a bad status of the hub means: PassingError, or huggingface_hub's own errors."""
    status = response.status_code
    if status in PASSING:
        raise PassingError(f"the hub answered {status}", _asked(response.headers))
    if status >= 400:
        response.read()  # says why
        hf_raise_for_status(response)


def ask(place: HubPlace, route: str, retries: Retries, **params: str) -> tuple[Any, dict[str, str]]:
    """What the hub's API says, and the parameters that ask for what comes next, if any.

    Args:
        route: behind ``/api/models/org/name``, quoted.
    """
    url = f"{endpoint()}/api/models/{place.repo}{route}"

    def attempt() -> tuple[Any, dict[str, str]]:
        response = get_session().get(url, params=params, headers=own_headers(), timeout=timeout())
        check_status(response)
        try:
            said = response.json()
        except ValueError:
            raise PassingError("the hub's answer is no JSON") from None
        # Its parameters alone: behind a mirror, the address may be the hub's own.
        following = urlsplit(response.links.get("next", {}).get("url", "")).query
        return said, dict(parse_qsl(following))

    return persistently(attempt, place, retries)


def pages(place: HubPlace, route: str, retries: Retries, **params: str) -> Iterator[Any]:
    """The entries of a list, which comes in pages."""
    while params:
        entries, params = ask(place, route, retries, **params)
        yield from entries


def quoted(part: str) -> str:
    """As one part of a route, slashes included."""
    return quote(part, safe="")


def _asked(headers: Mapping[str, str]) -> float:
    reset = _RESET.search(headers.get("ratelimit", ""))
    return asked_by(headers) or (float(reset[1]) if reset else 0.0)

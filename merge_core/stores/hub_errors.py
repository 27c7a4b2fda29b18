"""What goes wrong with the Hugging Face hub, in words that say what to do.

huggingface_hub's own errors hold the request, its token included, and signed addresses: nothing
of them is kept but what the hub says.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from huggingface_hub import constants, get_token
from huggingface_hub.errors import (
    DisabledRepoError,
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from merge_core.errors import AbsentError, StorageError, refuse, some_of

HTTP_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]
"""What the HTTP library of huggingface_hub raises; which library that is differs by version."""


class DeniedError(StorageError):
    """This account may not do that."""


LOG_IN = "`hf auth login`, or put a token into HF_TOKEN"


@dataclass(frozen=True, slots=True, kw_only=True)
class HubPlace:
    """A model on the hub as it was at one time, or a file of it."""

    repo: str
    """``org/name``."""
    revision: str
    """A commit, once it is known; a branch or a tag before."""
    path: str = ""
    """Of a file in the model."""

    def __str__(self) -> str:
        return f"hf://{self.repo}@{self.revision}" + (f"/{self.path}" if self.path else "")

    def at(self, path: str) -> HubPlace:
        """That file of the model."""
        return HubPlace(repo=self.repo, revision=self.revision, path=path)


@contextlib.contextmanager
def told(place: HubPlace) -> Iterator[None]:
    """Turn what huggingface_hub raises inside into errors of ours.

    Raises:
        InputError: see ``endpoint``.
        AbsentError: there is no such model, revision or file, as far as this account can see.
        DeniedError: the hub does not let this account do so.
        StorageError: any other failure.
    """
    endpoint()
    try:
        yield
    except (HTTP_ERROR, OfflineModeIsEnabled, EntryNotFoundError) as error:
        raise in_words(error, place) from None  # it holds the token


@contextlib.contextmanager
def before_all() -> Iterator[None]:
    """Take a wrong name or token for the wrong input that it is while nothing is under way.

    Raises:
        InputError: there is no such model or branch, or this account may not do what was tried.
    """
    try:
        yield
    except (AbsentError, DeniedError) as error:
        raise refuse(error.what, error.where, error.remedy) from None


def endpoint() -> str:
    """The hub's address: HF_ENDPOINT, or Hugging Face's own.

    Raises:
        InputError: it holds credentials, which would be printed.
    """
    host = urlsplit(constants.ENDPOINT).netloc
    if "@" in host:
        remedy = "Leave them out: a token belongs into HF_TOKEN, or to `hf auth login`"
        raise refuse("HF_ENDPOINT holds credentials", host.rpartition("@")[2], remedy)
    return constants.ENDPOINT


def in_words(error: Exception, place: HubPlace) -> StorageError:
    """The error of ours that says what ``error`` means."""
    for kinds, words in _MEANINGS:
        if isinstance(error, kinds):
            return words(error, place)
    return _unreachable(error, place)


def not_cached(place: HubPlace, commits: Sequence[str] = ()) -> AbsentError:
    """For what HF_HUB_OFFLINE keeps from being asked for.

    Args:
        commits: of the model, of which something is cached.
    """
    what = f"is not in the cache ({constants.HF_HUB_CACHE}), and HF_HUB_OFFLINE forbids to ask"
    remedy = f"Unset HF_HUB_OFFLINE, or fetch it first with `hf download {place.repo}`"
    if commits:
        remedy += f"; of commits, {some_of(commits)} can be named"
    return AbsentError(what, str(place), remedy)


def absent(place: HubPlace) -> AbsentError:
    """For a file that the model has not, or not in the cache when offline."""
    if constants.is_offline_mode():
        return not_cached(place)
    remedy = f"See {_page(place)}/tree/{place.revision}"
    return AbsentError("the model has no such file", str(place), remedy)


def _page(place: HubPlace) -> str:
    return f"{endpoint()}/{place.repo}"


def _not_cached(error: Any, place: HubPlace) -> StorageError:
    return not_cached(place) if constants.is_offline_mode() else _unreachable(error, place)


def _unreachable(error: Exception, place: HubPlace) -> StorageError:
    what = f"{endpoint()} cannot be reached ({type(error).__name__})"
    remedy = "Check the network, proxies and HF_ENDPOINT; HF_HUB_OFFLINE=1 takes what is cached"
    return StorageError(what, str(place), remedy)


def _gated(_: Any, place: HubPlace) -> StorageError:
    what = "the model is gated, and this account has not been let in"
    return DeniedError(what, str(place), f"Accept its terms at {_page(place)}, then {LOG_IN}")


def _disabled(_: Any, place: HubPlace) -> StorageError:
    return StorageError("the hub has disabled this model", str(place), f"See {_page(place)}")


def _no_revision(_: Any, place: HubPlace) -> StorageError:
    what = f"the model has no branch, tag or commit {place.revision!r}"
    return AbsentError(what, str(place), f"Choose one that {_page(place)}/refs lists")


def _no_model(_: Any, place: HubPlace) -> StorageError:
    seen = "that this account can see" if get_token() else "that can be seen without a token"
    remedy = f"Check the name; if the model is private, {LOG_IN} that may read it"
    return AbsentError(f"the hub has no such model {seen}", str(place), remedy)


def _no_file(_: Any, place: HubPlace) -> StorageError:
    return absent(place)


def _refused(error: Any, place: HubPlace) -> StorageError:
    status, said = error.response.status_code, (error.server_message or "").strip()
    what = f"the hub answered {status}" + (f" ({said})" if said else "")
    remedy = _REMEDIES.get(status, "Try again later; see https://status.huggingface.co")
    kind = DeniedError if status in (401, 403) else StorageError
    return kind(what, str(place), remedy)


_REMEDIES: Mapping[int, str] = {
    401: f"Renew the token: {LOG_IN}",
    403: f"Use a token that may do this: {LOG_IN}",
    429: f"Wait some minutes; with a token the hub allows more requests: {LOG_IN}",
}

_MEANINGS: Sequence[tuple[tuple[type[Exception], ...], Callable[[Any, HubPlace], StorageError]]] = (
    ((OfflineModeIsEnabled, LocalEntryNotFoundError), _not_cached),
    ((GatedRepoError,), _gated),
    ((DisabledRepoError,), _disabled),
    ((RevisionNotFoundError,), _no_revision),
    ((RepositoryNotFoundError,), _no_model),
    ((EntryNotFoundError,), _no_file),
    ((HfHubHTTPError,), _refused),
)
"""The first that fits: some are kinds of others."""

"""Big files that the hub holds though no commit has them yet: nobody sees them there.

What was sent is found again by its sha256, so that who begins anew sends nothing twice.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import CommitOperationAdd, HfApi, constants, get_session
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.lfs import UploadInfo, post_lfs_batch_info
from huggingface_hub.utils import (  # type: ignore[attr-defined]
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)

from merge_core.errors import StorageError
from merge_core.storage import reported
from merge_core.stores.hub_errors import HubPlace
from merge_core.stores.hub_requests import (
    PASSING,
    PassingError,
    own_headers,
    persistently,
    quoted,
)
from merge_core.stores.retries import PATIENT, Retries

ANSWER_SECONDS = 300.0
"""Without a byte, after which a request is given up: the hub checks every file of a commit before
it answers, and huggingface_hub would wait without end."""

_BATCH = 100
"""Objects that the hub is asked about at a time."""

_is_bounded: ContextVar[bool] = ContextVar("_is_bounded", default=False)
"""Whether a request is one of those here."""

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sent:
    """A big file that the hub holds, though no commit has it yet."""

    name: str
    size: int
    sha256: str


class HubObjects:
    """What the hub holds for one model.

    Args:
        target: the model, which must exist, and its branch.
    """

    def __init__(self, target: HubPlace, retries: Retries = PATIENT) -> None:
        self._target, self._retries = target, retries
        self._forgets = False
        """Whether it was seen not to tell of objects that it was sent through Xet."""

    def send(self, path: Path, name: str, *, through_lfs: bool = False) -> Sent:
        """Have the hub hold a big file, which may be removed here afterwards.

        Args:
            through_lfs: not through Xet, even where there is that.

        Raises:
            StorageError: it failed however often it was tried, or is not taken.
        """
        with reported(path), contextlib.ExitStack() as stack:
            # What is open already is nothing that Xet takes, as of huggingface_hub 1.3 to 2.4.
            file = stack.enter_context(path.open("rb")) if through_lfs else path
            add = CommitOperationAdd(path_in_repo=name, path_or_fileobj=file)

            def upload() -> None:
                HfApi().preupload_lfs_files(
                    self._target.repo, [add], revision=self._target.revision, free_memory=False
                )

            asked(upload, self._target.at(name), self._retries)
        return Sent(name=name, size=add.upload_info.size, sha256=add.upload_info.sha256.hex())

    def hold(self, path: Path, name: str) -> Sent:
        """The same, so that ``missing`` knows of it: who frees the file must be able to ask.

        Nobody promises that objects which came through Xet are told of before their commit; if
        they are not, they are sent through LFS, which does so.

        Raises:
            StorageError: see ``send``; or the hub does not say that it holds it.
        """
        with without_bars():
            sent = self.send(path, name, through_lfs=self._forgets)
            lost = self.missing([sent])
            if lost and not self._forgets:
                self._forgets = True
                sent = self.send(path, name, through_lfs=True)
                lost = self.missing([sent])
        if lost:
            what, where = "the hub does not hold what it was sent", str(self._target.at(name))
            raise StorageError(what, where, "Try again later")
        return sent

    def missing(self, sent: Sequence[Sent]) -> list[Sent]:
        """Those that the hub does not hold, or not any more: they must be sent again.

        Raises:
            StorageError: it cannot be asked.
        """
        batches = (sent[start : start + _BATCH] for start in range(0, len(sent), _BATCH))
        wanted = {oid for batch in batches for oid in self._wanted(batch)}
        return [one for one in sent if one.sha256 in wanted]

    def _wanted(self, batch: Sequence[Sent]) -> set[str]:
        """sha256 of those that the hub wants to be sent."""
        infos = [upload_info(one) for one in batch]

        def attempt() -> set[str]:
            objects, errors, _ = post_lfs_batch_info(
                infos,
                token=None,
                repo_type="model",
                repo_id=self._target.repo,
                revision=quoted(self._target.revision),
                headers=own_headers(),
            )
            absent = {entry["oid"] for entry in objects if entry.get("actions")}
            return absent | {error["oid"] for error in errors}

        return asked(attempt, self._target, self._retries)


def upload_info(sent: Sent) -> UploadInfo:
    """What huggingface_hub would have found out from the file."""
    return UploadInfo(size=sent.size, sample=b"", sha256=bytes.fromhex(sent.sha256))


def asked(attempt: Callable[[], _T], place: HubPlace, retries: Retries) -> _T:
    """``hub_requests.persistently`` for what huggingface_hub asks itself."""

    def told() -> _T:
        with _in_time(), spoken():
            return attempt()

    return persistently(told, place, retries)


@contextlib.contextmanager
def _in_time() -> Iterator[None]:
    """Bound what this thread asks while inside; the session is the whole process's."""
    hooks = get_session().event_hooks["request"]
    if _bound not in hooks:
        hooks.append(_bound)
    token = _is_bounded.set(True)
    try:
        yield
    finally:
        _is_bounded.reset(token)


def _bound(request: Any) -> None:
    """Give a request a timeout where it has none."""
    if _is_bounded.get():
        given = request.extensions.get("timeout", {})
        kinds = ("connect", "read", "write", "pool")
        bound = {kind: given.get(kind) or ANSWER_SECONDS for kind in kinds}
        request.extensions["timeout"] = bound


@contextlib.contextmanager
def without_bars() -> Iterator[None]:
    """Without huggingface_hub's own progress bars, which would disturb a merge's, and its logs."""
    if constants.HF_HUB_DISABLE_PROGRESS_BARS is not None or are_progress_bars_disabled():
        yield  # the environment has decided, or somebody before
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


@contextlib.contextmanager
def spoken() -> Iterator[None]:
    """Turn what huggingface_hub wraps back into what went wrong."""
    try:
        yield
    except HfHubHTTPError as error:
        if error.response.status_code in PASSING:
            raise PassingError(f"the hub answered {error.response.status_code}") from None
        raise
    except (RuntimeError, ValueError) as error:  # of an upload; of answers that make no sense
        cause: Any = error.__cause__
        if isinstance(cause, HfHubHTTPError) and cause.response.status_code not in PASSING:
            raise cause from None
        why = f" ({type(cause).__name__})" if cause else ""
        raise PassingError(f"{error}".rstrip(".") + why) from None

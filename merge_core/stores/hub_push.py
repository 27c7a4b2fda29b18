"""One commit to a model on the hub: big files are sent before, and seen by nobody until then.

    push = HubPush.begin("org/name")
    sent = [push.send(path, path.name) for path in shards]
    url = push.commit(sent, {"config.json": path}, "A merge")

What was sent is found again by its sha256, so whoever begins anew sends nothing twice. The
commit names its parent. Where its answer is lost, the head says whether it was made.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    constants,
    get_session,
)
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.lfs import UploadInfo, post_lfs_batch_info

from merge_core.errors import StorageError, VerificationError, refuse, some_of
from merge_core.storage import reported
from merge_core.stores.hub_errors import HTTP_ERROR, HubPlace
from merge_core.stores.hub_files import HubEntry, pin, read_tree
from merge_core.stores.hub_requests import (
    PASSING,
    PassingError,
    ask,
    own_headers,
    persistently,
    quoted,
)
from merge_core.stores.hub_retries import PATIENT, Retries

ANSWER_SECONDS = 300.0
"""Without a byte, after which a request is given up: the hub checks every file of a commit before
it answers, and huggingface_hub would wait without end."""

_BATCH = 100
"""Objects that the hub is asked about at a time."""

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sent:
    """A big file that the hub holds, though no commit has it yet."""

    name: str
    size: int
    sha256: str


class HubPush:
    """A commit under way.

    Args:
        target: the model and its branch.
        parent: the commit that it will follow.
    """

    def __init__(self, target: HubPlace, parent: str, retries: Retries = PATIENT) -> None:
        self._target, self._parent, self._retries = target, parent, retries

    @classmethod
    def begin(
        cls,
        repo: str,
        revision: str | None = None,
        *,
        private: bool = True,
        retries: Retries = PATIENT,
    ) -> HubPush:
        """Make the model if there is none, and see what it has.

        Args:
            revision: a branch, which must exist; None: the main one.
            private: nobody else may see it, even if it exists already.

        Raises:
            InputError: it exists, and is not private.
            StorageError: this account may not make it, or write to it.
        """
        target = HubPlace(repo=repo, revision=revision or constants.DEFAULT_REVISION)

        def make() -> None:
            HfApi().create_repo(repo, private=private, exist_ok=True)

        _persistently(make, target, retries)
        said, _ = ask(target, f"/revision/{quoted(target.revision)}", retries)
        if private and not said["private"]:
            remedy = "Choose another name, or say that it may be public"
            raise refuse("the model exists already, and everybody can see it", str(target), remedy)
        return cls(target, said["sha"], retries)

    @property
    def url(self) -> str:
        """Of the commit that is followed."""
        return _url(self._target, self._parent)

    def files(self) -> Mapping[str, HubEntry]:
        """What the model has in the commit that is followed."""
        return _files_at(self._target, self._parent, self._retries)

    def send(self, path: Path, name: str) -> Sent:
        """Have the hub hold a big file, which may be removed here afterwards.

        Raises:
            StorageError: it failed however often it was tried, or is not taken.
        """
        with reported(path):
            add = CommitOperationAdd(path_in_repo=name, path_or_fileobj=path)

        def upload() -> None:
            HfApi().preupload_lfs_files(
                self._target.repo, [add], revision=self._target.revision, free_memory=False
            )

        _persistently(upload, self._target.at(name), self._retries)
        return Sent(name=name, size=add.upload_info.size, sha256=add.upload_info.sha256.hex())

    def missing(self, sent: Sequence[Sent]) -> list[Sent]:
        """Those that the hub does not hold, or not any more: they must be sent again."""
        batches = (sent[start : start + _BATCH] for start in range(0, len(sent), _BATCH))
        wanted = {oid for batch in batches for oid in self._wanted(batch)}
        return [one for one in sent if one.sha256 in wanted]

    def commit(
        self,
        sent: Sequence[Sent],
        files: Mapping[str, Path | bytes],
        title: str,
        removed: Iterable[str] = (),
    ) -> str:
        """Make all of it part of the model, at once; returns the address of the commit.

        Args:
            files: small ones, by their names in the model.
            title: of the commit.
            removed: names of files that the model has and is to have no longer.

        Raises:
            StorageError: somebody else has committed meanwhile, or the hub refuses.
            VerificationError: what the hub has afterwards is not what was sent.
        """
        contents = {name: _bytes_of(file) for name, file in files.items()}
        wanted: dict[str, str | bytes] = {**{one.name: one.sha256 for one in sent}, **contents}
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            *(_held(one) for one in sent),
            *(CommitOperationAdd(path_in_repo=n, path_or_fileobj=d) for n, d in contents.items()),
            *(CommitOperationDelete(path_in_repo=name) for name in removed),
        ]

        def attempt() -> str:
            try:
                with _spoken():
                    made = HfApi().create_commit(
                        self._target.repo,
                        operations,
                        commit_message=title,
                        revision=self._target.revision,
                        parent_commit=self._parent,
                    )
            except (HTTP_ERROR, PassingError) as error:
                return self._head_after(error, wanted)
            return made.oid

        commit = _persistently(attempt, self._target, self._retries)
        self._verify(commit, wanted)
        return _url(self._target, commit)

    def _wanted(self, batch: Sequence[Sent]) -> set[str]:
        """sha256 of those that the hub wants to be sent."""
        infos = [_info(one) for one in batch]

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

        return _persistently(attempt, self._target, self._retries)

    def _head_after(self, error: Exception, wanted: Mapping[str, str | bytes]) -> str:
        """The commit that was made though its answer did not come; raises what to do otherwise."""
        head = pin(self._target, self._retries)[0].revision
        if head == self._parent:  # nothing happened: what passes may be tried again
            raise error
        if not self._differences(head, wanted):
            return head
        what = (
            f"somebody else has committed meanwhile: the head was {self._parent[:12]} when the "
            f"push began, and is {head[:12]} now"
        )
        remedy = "See what they did, and push again: what was sent is not sent again"
        raise StorageError(what, str(self._target), remedy)

    def _verify(self, commit: str, wanted: Mapping[str, str | bytes]) -> None:
        if wrong := self._differences(commit, wanted):
            what = f"the hub holds something else than was sent, or nothing: {some_of(wrong)}"
            remedy = "Revert the commit there, and push again"
            raise VerificationError(what, _url(self._target, commit), remedy)

    def _differences(self, commit: str, wanted: Mapping[str, str | bytes]) -> list[str]:
        files = _files_at(self._target, commit, self._retries)
        return [
            name
            for name, content in wanted.items()
            if name not in files or not files[name].holds(content)
        ]


def _files_at(target: HubPlace, commit: str, retries: Retries) -> Mapping[str, HubEntry]:
    place = HubPlace(repo=target.repo, revision=commit)
    return read_tree(place, "", 0.0, retries).files


def _url(target: HubPlace, commit: str) -> str:
    return f"{constants.ENDPOINT}/{target.repo}/commit/{commit}"


def _bytes_of(file: Path | bytes) -> bytes:
    if isinstance(file, bytes):
        return file
    with reported(file):
        return file.read_bytes()


def _info(sent: Sent) -> UploadInfo:
    return UploadInfo(size=sent.size, sample=b"", sha256=bytes.fromhex(sent.sha256))


def _held(sent: Sent) -> CommitOperationAdd:
    """The operation of a file that was sent before, maybe by another process.

    huggingface_hub knows only operations whose file it sent itself; what it notes on them then
    (as of 1.3 to 2.4) is set here.
    """
    add = CommitOperationAdd(path_in_repo=sent.name, path_or_fileobj=b"")
    add.upload_info = _info(sent)
    add._upload_mode, add._is_uploaded = "lfs", True  # noqa: SLF001
    return add


def _persistently(attempt: Callable[[], _T], place: HubPlace, retries: Retries) -> _T:
    """``hub_requests.persistently`` for what huggingface_hub asks itself."""
    session = get_session()
    before, session.timeout = session.timeout, ANSWER_SECONDS

    def spoken() -> _T:
        with _spoken():
            return attempt()

    try:
        return persistently(spoken, place, retries)
    finally:
        session.timeout = before


@contextlib.contextmanager
def _spoken() -> Iterator[None]:
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

"""One commit to a model on the hub: big files are sent before, and seen by nobody until then.

    push = HubPush.begin("org/name")
    sent = [push.send(path, path.name) for path in shards]
    url = push.commit(sent, {"config.json": path}, "A merge")

What was sent is found again by its sha256, so whoever begins anew sends nothing twice. The
commit names its parent. Where its answer is lost, the head says whether it was made.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    constants,
    get_token,
)

from merge_core.errors import AbsentError, StorageError, VerificationError, refuse, some_of
from merge_core.storage import reported
from merge_core.stores.hub import HubStore
from merge_core.stores.hub_errors import HTTP_ERROR, LOG_IN, HubPlace, before_all, endpoint
from merge_core.stores.hub_files import HubEntry, pin, read_tree
from merge_core.stores.hub_objects import HubObjects, Sent, asked, spoken, upload_info, without_bars
from merge_core.stores.hub_requests import PassingError, ask, quoted
from merge_core.stores.location import Location
from merge_core.stores.retries import PATIENT, Retries

_NOBODYS = Sent(name="nobodys.safetensors", size=1, sha256=hashlib.sha256(b"\0").hexdigest())
"""A file that is asked about, and never sent."""


class HubPush(HubObjects):
    """A commit under way.

    Args:
        target: the model and its branch.
        parent: the commit that it will follow.
    """

    def __init__(self, target: HubPlace, parent: str, retries: Retries = PATIENT) -> None:
        super().__init__(target, retries)
        self.parent = parent

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
            InputError: it exists, and is not private; or see ``before_all``.
            StorageError: the hub cannot be asked.
        """
        there = cls.look(repo, revision, private=private, retries=retries)
        if there is not None:
            return there
        place = HubPlace(repo=repo, revision=revision or constants.DEFAULT_REVISION)

        def make() -> None:
            HfApi().create_repo(repo, private=private, exist_ok=True)

        with before_all():
            asked(make, place, retries)
        found = cls.look(repo, revision, private=private, retries=retries)
        if found is None:
            raise StorageError("the model was made, and is not there", str(place), "Try again")
        return found

    @classmethod
    def look(
        cls,
        repo: str,
        revision: str | None = None,
        *,
        private: bool = True,
        retries: Retries = PATIENT,
    ) -> HubPush | None:
        """See what the model has; None if there is none, which ``begin`` would make.

        Raises:
            InputError: as ``begin`` does.
            StorageError: the hub cannot be asked.
        """
        target = HubPlace(repo=repo, revision=revision or constants.DEFAULT_REVISION)
        if get_token() is None:
            what, remedy = "there is no token, and nobody writes without", "Use one that may write"
            raise refuse(what, str(target), f"{remedy}: {LOG_IN}")
        with before_all():
            try:
                said, _ = ask(target, f"/revision/{quoted(target.revision)}", retries)
            except AbsentError:
                if target.revision == constants.DEFAULT_REVISION:
                    return None
                raise
        if private and not said["private"]:
            remedy = "Choose another name, or say --public"
            raise refuse("the model exists already, and everybody can see it", str(target), remedy)
        return cls(target, said["sha"], retries)

    def check_writable(self) -> None:
        """Ask where a file could be sent to, and send none.

        Raises:
            InputError: this account may not write to the model.
            StorageError: the hub cannot be asked.
        """
        with before_all():
            self.missing([_NOBODYS])

    @property
    def url(self) -> str:
        """Of the commit that is followed."""
        return _url(self._target, self.parent)

    def __str__(self) -> str:
        return str(self._target)

    def files(self) -> Mapping[str, HubEntry]:
        """What the model has in the commit that is followed."""
        return _files_at(self._target, self.parent, self._retries)

    def read(self, name: str) -> bytes:
        """All of a small file in the commit that is followed."""
        there = Location(scheme="hf", root=self._target.repo, revision=self.parent)
        return HubStore(there, retries=self._retries).get(name)

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
                with spoken(), without_bars():
                    made = HfApi().create_commit(
                        self._target.repo,
                        operations,
                        commit_message=title,
                        revision=self._target.revision,
                        parent_commit=self.parent,
                    )
            except (HTTP_ERROR, PassingError) as error:
                return self._head_after(error, wanted)
            return made.oid

        commit = asked(attempt, self._target, self._retries)
        self._verify(commit, wanted)
        return _url(self._target, commit)

    def _head_after(self, error: Exception, wanted: Mapping[str, str | bytes]) -> str:
        """The commit that was made though its answer did not come; raises what to do otherwise."""
        head = pin(self._target, self._retries)[0].revision
        if head == self.parent:  # nothing happened: what passes may be tried again
            raise error
        if not self._differences(head, wanted):
            return head
        what = (
            f"somebody else has committed meanwhile: the head was {self.parent[:12]} at the "
            f"beginning, and is {head[:12]} now"
        )
        remedy = "See what they did; the same command again sends nothing that the hub holds"
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


def check_owner(repo: str, retries: Retries = PATIENT) -> None:
    """Make sure that this account may make a model of that name, as far as the hub tells: what a
    fine-grained token may do is seen when it does.

    Raises:
        InputError: it may not.
        StorageError: the hub cannot be asked.
    """
    place = HubPlace(repo=repo, revision=constants.DEFAULT_REVISION)
    with before_all():
        said = asked(HfApi().whoami, place, retries)
    role = said.get("auth", {}).get("accessToken", {}).get("role")
    if role == "read":
        remedy = f"Use one that may write: {LOG_IN}"
        raise refuse("the token may only read", str(place), remedy)
    owner = repo.partition("/")[0]
    names = [said["name"], *(one["name"] for one in said.get("orgs", ()))]
    if role == "write" and owner.lower() not in map(str.lower, names):
        what = f"the account {names[0]} may not make models of {owner}"
        remedy = f"Choose another name, such as hf://{names[0]}/..., or another account: {LOG_IN}"
        raise refuse(what, str(place), remedy)


def _files_at(target: HubPlace, commit: str, retries: Retries) -> Mapping[str, HubEntry]:
    place = HubPlace(repo=target.repo, revision=commit)
    return read_tree(place, "", 0.0, retries).files


def _url(target: HubPlace, commit: str) -> str:
    return f"{endpoint()}/{target.repo}/commit/{commit}"


def _bytes_of(file: Path | bytes) -> bytes:
    if isinstance(file, bytes):
        return file
    with reported(file):
        return file.read_bytes()


def _held(sent: Sent) -> CommitOperationAdd:
    """The operation of a file that was sent before, maybe by another process.

    huggingface_hub knows only operations whose file it sent itself; what it notes on them then
    (as of 1.3 to 2.4) is set here.
    """
    add = CommitOperationAdd(path_in_repo=sent.name, path_or_fileobj=b"")
    add.upload_info = upload_info(sent)
    add._upload_mode, add._is_uploaded = "lfs", True  # noqa: SLF001
    return add

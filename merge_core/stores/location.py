"""Where a checkpoint or an adapter lies: a path, an object store, or the Hugging Face hub.

    /models/base  models/base  file:///models/base     a directory
    s3://bucket/key  gs://bucket/key                   objects whose keys begin like that
    hf://org/name[@revision][/subfolder]               a model on the hub
    org/name                                           the same, where no such path exists
    memory://name                                      this process alone, for tests and examples

A location holds no credentials, so that it can be printed, sent and kept.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from merge_core.errors import refuse

_URL = re.compile(r"^(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://(?P<rest>.*)$", re.DOTALL)
_BUCKET = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,221}$")
_HUB_PART = (
    r"(?![^/@]*(--|\.\.))[A-Za-z0-9]([A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?(?<!\.git)(?![A-Za-z0-9._-])"
)
"""As huggingface_hub has it, which refuses others before it asks for anything."""

_HUB_ID = re.compile(rf"^{_HUB_PART}/{_HUB_PART}$")
_HUB = re.compile(
    rf"^(?P<id>{_HUB_PART}/{_HUB_PART})"
    r"(@(?P<revision>refs/(pr|convert)/[^/@]+|[^/@]+))?(/(?P<path>.+))?$"
)
_REMEDY = "Give a path, s3://bucket/key, gs://bucket/key or hf://org/name[@revision][/subfolder]"


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """How a store is reached, as far as that is no secret."""

    endpoint_url: str | None = None
    """Of an S3 other than Amazon's."""
    region: str | None = None
    """Of that S3."""
    anonymous: bool = False
    """Sign nothing: for public buckets, of S3 and GCS."""
    cache: bool = False
    """Have whole files of the hub on each node before they are read, not ranges of them."""


DEFAULT_ACCESS = Access()
"""As the environment has it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Location:
    """A folder somewhere, or a file in one."""

    scheme: str
    """``file``, ``s3``, ``gs``, ``hf`` or ``memory``."""
    root: str = ""
    """Bucket, or ``org/name``; empty for ``file``."""
    path: str = ""
    """Of ``file`` absolute; of others without slashes at either end."""
    revision: str | None = None
    """Of the hub: branch, tag or commit; None: the main branch."""
    access: Access = DEFAULT_ACCESS
    """How a store is reached: this folder's, or that of what is found by what it says."""
    upload: Upload | None = None
    """How a merge gets there, where it is a model on the hub; None: only to read from."""

    def __str__(self) -> str:
        if self.scheme == "file":
            return self.path
        at = f"@{self.revision}" if self.revision else ""
        return f"{self.scheme}://{self.root}{at}" + (f"/{self.path}" if self.path else "")

    def __truediv__(self, name: str) -> Location:
        """The file or folder ``name`` in it."""
        return replace(self, path=f"{self.path.rstrip('/')}/{name}" if self.path else name)

    @property
    def name(self) -> str:
        """Its last part."""
        return PurePosixPath(self.path or self.root).name

    @property
    def parent(self) -> Location:
        """The folder that it lies in."""
        above, _, _ = self.path.rpartition("/")
        return replace(self, path=above or ("/" if self.is_local else ""))

    @property
    def is_local(self) -> bool:
        """Whether it is a path of this machine."""
        return self.scheme == "file"

    @property
    def local(self) -> Path:
        """The path that it is.

        Raises:
            AssertionError: it is none.
        """
        if not self.is_local:
            raise AssertionError(f"{self} is no path")
        return Path(self.path)


@dataclass(frozen=True, slots=True, kw_only=True)
class Upload:
    """How a merge gets onto the hub, which holds weights and nothing else before its one commit."""

    state: Location
    """The folder of all that is small: plan, lease, receipts, ledger. Every node reaches it."""
    private: bool = True
    """Nobody else may see the model."""
    scratch: str | None = None
    """The directory of each node in which a shard lies until it is sent; None: one of our own where
    temporary files belong."""
    scratch_limit: int | None = None
    """Bytes that all workers of a node may have there at a time; None: what is free."""


Place = str | Path | Location
"""What ``locate`` takes."""

Exists = Callable[[str], bool]


def locate(
    text: Place, access: Access = DEFAULT_ACCESS, exists: Exists = os.path.lexists
) -> Location:
    """What ``text`` means.

    Args:
        access: kept in the location, whatever it is: a plan on a disk may name an S3.
        exists: whether there is such a path; a hub id is one only where there is none.

    Raises:
        InputError: it means nothing, holds credentials, or is in GCS and ``access`` names a server.
    """
    if isinstance(text, Location):
        return text
    place = _parse(text, exists)
    if place.scheme == "gs" and access.endpoint_url is not None:
        _refuse_endpoint(place)
    return replace(place, access=access)


def locate_out(text: Place, access: Access = DEFAULT_ACCESS) -> Location:
    """What ``text`` means as OUT: no bare id of the hub, where no merge is written, since
    ``results/new`` is a path that is yet to be made.

    Raises:
        InputError: see ``locate``.
    """
    return locate(text, access, exists=lambda _: True)


def locate_model(text: str, branch: str | None = None) -> Location:
    """The model on the hub that ``text`` means where it can mean nothing else: ``org/name`` or
    ``hf://org/name``, each with or without ``@branch``.

    Args:
        branch: given beside it; None: that of ``text``, if any.

    Raises:
        InputError: it is none, or only a folder of one, or names another branch.
    """
    url = _URL.match(text)
    if url is not None:
        _refuse_secrets(url["rest"], text)
    match = _HUB.match(text if url is None else url["rest"])
    if match is None or match["path"] or (url is not None and url["scheme"].lower() != "hf"):
        raise refuse("is no model on the hub", text, "Write org/name[@branch], hf:// or not")
    named = match["revision"]
    if branch is not None and named not in (None, branch):
        what = f"names another branch than --revision {branch}"
        raise refuse(what, text, "Give one of them")
    return Location(scheme="hf", root=match["id"], revision=branch or named)


def onto_hub(model: Location, upload: Upload) -> Location:
    """A model on the hub as OUT.

    Raises:
        InputError: it is none, or only a folder of one, or its state cannot lie where it should.
    """
    if model.scheme != "hf" or model.path:
        raise refuse("is no model on the hub", str(model), "Write hf://org/name[@branch]")
    if upload.state.scheme == "hf":
        what = "the hub keeps nothing of a merge but its one commit"
        raise refuse(what, f"--state {upload.state}", "Give a folder or s3://bucket/key")
    return replace(model, upload=upload)


def _parse(text: str | Path, exists: Exists) -> Location:
    url = _URL.match(str(text)) if isinstance(text, str) else None
    if url is None:
        return _path_or_hub_id(str(text), exists)
    scheme, rest = url["scheme"].lower(), url["rest"]
    if scheme == "file":
        return _local(_file_path(rest, str(text)))
    if scheme == "hf":
        return _hub(rest, str(text))
    if scheme not in ("s3", "gs", "memory"):
        raise refuse(f"raymeld knows no {scheme}://", _shown(str(text)), _REMEDY)
    bucket, _, key = rest.partition("/")
    _refuse_secrets(rest, str(text))
    if _BUCKET.match(bucket) is None:
        raise refuse(f"{bucket!r} is no bucket", str(text), _REMEDY)
    return Location(scheme=scheme, root=bucket, path=_key(key, str(text)))


def is_bare_hub_id(text: Place, exists: Exists = os.path.lexists) -> bool:
    """Whether it is looked for on the hub though it could be a path: worth a word."""
    if not isinstance(text, str) or _URL.match(text):
        return False
    return not locate(text, exists=exists).is_local


def _path_or_hub_id(text: str, exists: Exists) -> Location:
    """A path, unless nothing speaks for one: a mistyped path must never become a download."""
    name = text.partition("@")[0]
    beside = exists(name.partition("/")[0])
    if _HUB_ID.match(name) and not beside and not exists(text) and _HUB.match(text):
        return _hub(text, text)
    return _local(text)


def _local(path: str) -> Location:
    if "\0" in path or not path:
        raise refuse("is no path", repr(path), _REMEDY)
    return Location(scheme="file", path=str(Path(path).absolute()))


def _file_path(rest: str, text: str) -> str:
    for host in ("", "localhost"):
        if rest.startswith(f"{host}/"):
            return rest.removeprefix(host)
    raise refuse("names another machine", text, "Write file:///the/whole/path")


def _hub(rest: str, text: str) -> Location:
    _refuse_secrets(rest, text)
    match = _HUB.match(rest)
    if match is None:
        raise refuse("is no model on the hub", text, "Write hf://org/name[@revision][/subfolder]")
    path = _key(match["path"] or "", text)
    return Location(scheme="hf", root=match["id"], path=path, revision=match["revision"])


def _key(key: str, text: str) -> str:
    parts = [part for part in key.split("/") if part]
    if any(part in (".", "..") for part in parts) or "\0" in key:
        raise refuse("has '.' or '..' in its key", text, "Write the key itself")
    return "/".join(parts)


def _refuse_endpoint(place: Location) -> None:
    """Passed over, one would be taken for another server's; followed, another S3 would be sent
    tokens of Google's.
    """
    what = "is in Google Cloud Storage, and --endpoint-url is of an S3"
    remedy = (
        "Leave it out: GOOGLE_BASE_URL names another server of GCS, and AWS_ENDPOINT_URL, or "
        "endpoint_url in ~/.aws/config, that S3, in the environment of every node"
    )
    raise refuse(what, str(place), remedy)


def _refuse_secrets(rest: str, text: str) -> None:
    """Keys and signatures do not belong into what is printed and kept."""
    if "@" in rest.partition("/")[0] or re.search(
        r"[?&][\w-]*(signature|token|key)", rest, re.IGNORECASE
    ):
        remedy = "Leave them to the environment: AWS_PROFILE, an instance's role, HF_TOKEN"
        raise refuse("holds credentials", _shown(text), remedy)


def _shown(text: str) -> str:
    """Without what may be a secret."""
    return re.sub(r"//[^/]*@", "//...@", text).partition("?")[0]

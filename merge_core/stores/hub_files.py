"""Which files a model on the hub has, at which commit: from the hub, or from the cache.

The cache is huggingface_hub's own. It is read, and filled through huggingface_hub alone.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.file_download import repo_folder_name

from merge_core.errors import AbsentError, StorageError
from merge_core.storage import reported
from merge_core.stores.cache_room import Coming, room_for
from merge_core.stores.hub_errors import HubPlace, not_cached, told
from merge_core.stores.hub_requests import ask, pages, quoted
from merge_core.stores.retries import Retries

_COMMIT = re.compile(r"^[0-9a-f]{40}$")
_OID = re.compile(r"^[0-9a-f]{40}([0-9a-f]{24})?$")


@dataclass(frozen=True, slots=True, kw_only=True)
class HubEntry:
    """A file of a model."""

    size: int
    oid: str
    """``sha256:`` of what is stored as LFS, ``git:`` of what is in the repository itself; empty
    where a cache without links does not tell."""

    def holds(self, content: bytes | str) -> bool:
        """Whether, as far as the oid tells, it is these bytes, or those of that sha256."""
        kind, _, oid = self.oid.partition(":")
        if kind == "git":
            return isinstance(content, bytes) and oid == _git_oid(content)
        digest = content if isinstance(content, str) else hashlib.sha256(content).hexdigest()
        return oid in ("", digest)


@dataclass(frozen=True, slots=True, kw_only=True)
class HubTree:
    """The files of a model at one commit, by their whole path."""

    place: HubPlace
    modified: float
    """When the model last changed, in seconds since the epoch; 0 where nothing tells."""
    files: Mapping[str, HubEntry]


def pin(location: HubPlace, retries: Retries) -> tuple[HubPlace, float]:
    """The model at the commit that ``location`` means now, and when it last changed.

    Raises:
        AbsentError: there is no such model or revision, or not in the cache when offline.
        StorageError: the hub fails, or lets nobody in.
    """
    if constants.is_offline_mode():
        return _pinned(location, _cached_commit(location)), 0.0
    if _COMMIT.match(location.revision):
        return location, 0.0
    said, _ = ask(location, f"/revision/{quoted(location.revision)}", retries)
    changed = said.get("lastModified")
    modified = datetime.fromisoformat(changed).timestamp() if changed else 0.0
    return _pinned(location, said["sha"]), modified


def read_tree(place: HubPlace, below: str, modified: float, retries: Retries) -> HubTree:
    """The files in the folder ``below`` of a model that is pinned; none if there is no such folder.

    When offline: those that are cached.
    """
    files = _cached_files(place, below) if constants.is_offline_mode() else None
    if files is None:
        files = dict(_listed_files(place, below, retries))
    return HubTree(place=place, modified=modified, files=files)


def cached_file(place: HubPlace) -> Path | None:
    """Where a file lies in the cache, if it does."""
    found = try_to_load_from_cache(place.repo, place.path, revision=place.revision)
    return Path(found) if isinstance(found, str) else None


def fetch(place: HubPlace, entry: HubEntry) -> Path:
    """The file in the cache, fetched if it is not there.

    That is huggingface_hub's own work: processes of a machine wait for each other, and what broke
    off is continued.

    Raises:
        StorageError: the disk of the cache has no room for what is to come, or the hub fails.
    """
    found = cached_file(place)
    if found is not None:
        return found
    blob = _folder(place) / "blobs" / entry.oid.partition(":")[2]
    try:
        with (
            room_for(Coming(blob=str(blob), size=entry.size)),
            reported(_folder(place)),
            told(place),
        ):
            return Path(hf_hub_download(place.repo, place.path, revision=place.revision))
    except RuntimeError as error:  # hf_xet's
        remedy = "Try again; without --cache, or with HF_HUB_DISABLE_XET=1, it is not needed"
        raise StorageError(f"hf_xet failed: {error}", str(place), remedy) from error


def _git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()  # noqa: S324 - git's own


def _pinned(location: HubPlace, commit: str) -> HubPlace:
    return HubPlace(repo=location.repo, revision=commit, path=location.path)


def _listed_files(place: HubPlace, below: str, retries: Retries) -> Iterator[tuple[str, HubEntry]]:
    route = f"/tree/{quoted(place.revision)}" + (f"/{quoted(below)}" if below else "")
    try:
        for entry in pages(place, route, retries, recursive="true"):
            if entry["type"] == "file":
                lfs = entry.get("lfs")
                oid = f"sha256:{lfs['oid']}" if lfs else f"git:{entry['oid']}"
                yield entry["path"], HubEntry(size=entry["size"], oid=oid)
    except AbsentError:
        if not below:
            raise
        # The commit itself is there, or this says that it is not.
        ask(place, f"/revision/{quoted(place.revision)}", retries)


def _folder(place: HubPlace) -> Path:
    return Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=place.repo, repo_type="model")


def _cached_commit(location: HubPlace) -> str:
    commit = location.revision
    if not _COMMIT.match(commit):
        try:
            commit = (_folder(location) / "refs" / commit).read_text().strip()
        except OSError:
            raise not_cached(location, _snapshots(location)) from None
    if not (_folder(location) / "snapshots" / commit).is_dir():
        raise not_cached(location, _snapshots(location))
    return commit


def _snapshots(location: HubPlace) -> list[str]:
    """Commits of which the cache has files. Not all have a branch: what was fetched by its commit
    alone has none.
    """
    return sorted(path.name for path in (_folder(location) / "snapshots").glob("*"))


def _cached_files(place: HubPlace, below: str) -> dict[str, HubEntry]:
    snapshot = _folder(place) / "snapshots" / place.revision
    return {
        path.relative_to(snapshot).as_posix(): _cached_entry(path)
        for path in (snapshot / below).rglob("*")
        if path.is_file()
    }


def _cached_entry(path: Path) -> HubEntry:
    """A snapshot links to a blob, which is named like the file's ETag."""
    name = path.readlink().name if path.is_symlink() else ""
    kind = {40: "git:", 64: "sha256:"}.get(len(name), "") if _OID.match(name) else ""
    return HubEntry(size=path.stat().st_size, oid=kind + name if kind else "")

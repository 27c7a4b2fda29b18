"""From a location to its store, and the few things that one does to a single file somewhere."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from merge_core.errors import AbsentError, StorageError, replaced
from merge_core.stores.location import Location
from merge_core.stores.store import FileIdentity, Reader, Store

if TYPE_CHECKING:
    from merge_core.stores.hub_out import HubOut, SentFile


@functools.lru_cache(maxsize=64)
def open_store(location: Location) -> Store:
    """The store of a folder; its client is imported and made when it is needed.

    Raises:
        StorageError: there are no credentials for it, or it is no store that can be reached.
    """
    if location.is_local:
        from merge_core.stores.local import LocalStore

        return LocalStore(location)
    if location.scheme == "s3":
        from merge_core.stores.s3 import S3Store

        return S3Store(location)
    if location.scheme == "gs":
        from merge_core.stores.gcs import GcsStore

        return GcsStore(location)
    if location.upload is not None:
        return open_hub_out(location)
    if location.scheme == "hf":
        from merge_core.stores.hub import HubStore

        return HubStore(location)
    from merge_core.stores.objects import ObjectsStore

    return ObjectsStore(location)


@functools.lru_cache(maxsize=64)
def open_hub_out(location: Location) -> HubOut:
    """The store of a merge that goes to the hub; raises as ``open_store`` does.

    Raises:
        AssertionError: the location says nothing of how.
    """
    from merge_core.stores.hub_out import HubOut

    if location.upload is None:
        raise AssertionError(f"{location} is only read from")
    state = location.upload.state
    return HubOut(location, open_store(state / location.path if location.path else state))


def sent_unread(file: Location) -> SentFile | None:
    """What stands for a file of weights that the hub holds and nobody can read before its commit;
    None for any other file.

    Raises:
        AbsentError: it was not sent.
    """
    if file.upload is None or not file.path.endswith(".safetensors"):
        return None
    out = open_hub_out(file.parent)
    return None if out.committed else out.sent(file.name)


def pinned(folder: Location) -> Location:
    """The folder as it is now, where its store keeps older versions: at a commit of the hub.

    Raises:
        StorageError: the hub cannot be reached, or has no such model.
    """
    if folder.scheme != "hf":
        return folder
    from merge_core.stores.hub import HubStore

    return HubStore(folder).pinned  # not the store that is kept: a branch may have moved since


def parted(file: Location) -> tuple[Store, str]:
    """The store of the folder that a file lies in, and its name there."""
    return open_store(file.parent), file.name


def read_file(file: Location) -> bytes:
    """All of a small file.

    Raises:
        AbsentError: there is none.
        StorageError: it cannot be read.
    """
    store, name = parted(file)
    return store.get(name)


def open_file(file: Location) -> tuple[Reader, int]:
    """A file as it is now, opened, and its size. Raises as ``read_file`` does."""
    store, name = parted(file)
    identity = store.look(name)
    return store.open(identity), identity.size


def fetch(folder: Location, file: FileIdentity) -> None:
    """Before much of a file is read: have one of the hub whole on this machine, if that is asked
    for (``Access.cache``). Planning, which reads headers, does without.

    Raises:
        StorageError: it cannot be fetched, or there is no room for it.
    """
    if folder.scheme == "hf" and folder.access.cache:
        from merge_core.stores.hub import HubStore

        HubStore(folder).fetch(file)


def lacks_tls(folder: Location) -> bool:
    """Whether what is read there passes a network on which nobody would notice if it changed."""
    if folder.scheme == "s3":
        from merge_core.stores.s3_client import client_for

        return str(client_for(folder.access).meta.endpoint_url).startswith("http://")
    if folder.scheme == "gs":
        from merge_core.stores.gcs_client import base_url

        return base_url().startswith("http://")
    if folder.scheme == "hf":
        from huggingface_hub import constants

        return constants.ENDPOINT.startswith("http://") and not constants.is_offline_mode()
    return False


def is_there(file: Location) -> bool:
    """Whether there is such a file, be it no file or one that may not be read."""
    store, name = parted(file)
    try:
        store.look(name)
    except AbsentError:
        return False
    except StorageError:
        return True
    return True


def check_unchanged(folder: Location, file: FileIdentity) -> None:
    """Make sure that a file is the one that was planned with.

    Raises:
        StorageError: it was replaced, or is gone.
    """
    if not file.is_still(open_store(folder).look(file.name)):
        raise replaced(folder / file.name)

"""Several workers that fetch into one cache: room is kept for what all of them fetch."""

from __future__ import annotations

import fcntl
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from hub_client import HubClient

from merge_core.errors import StorageError
from merge_core.stores import cache_room
from merge_core.stores.cache_room import Coming, room_for


class Disk:
    """What is free there."""

    free = 10_000

    def disk_usage(self, _: object) -> SimpleNamespace:
        return SimpleNamespace(free=self.free)


@pytest.fixture
def disk(client: HubClient, monkeypatch: pytest.MonkeyPatch) -> Disk:
    (client.cache / "blobs").mkdir(parents=True)
    monkeypatch.setattr(cache_room, "shutil", disk := Disk())
    return disk


def coming(client: HubClient, name: str, size: int) -> Coming:
    return Coming(blob=str(client.cache / "blobs" / name), size=size)


def notes(client: HubClient) -> list[Path]:
    return list((client.cache / ".locks" / "raymeld").glob("*.json"))


def test_what_others_still_fetch_is_not_free(client: HubClient, disk: Disk) -> None:
    one, other = coming(client, "one", 6_000), coming(client, "other", 5_000)
    wanted = r"5,000 bytes are to come, 10,000 are free, 6,000 of them for what others fetch"
    with room_for(one):
        with pytest.raises(StorageError, match=wanted), room_for(other):
            pass
        with room_for(coming(client, "small", 4_000)):
            pass
        begun = client.cache / "blobs" / "one.1234.incomplete"
        begun.write_bytes(bytes(2_000))
        disk.free = 8_000
        with pytest.raises(StorageError, match="8,000 are free, 4,000 of them"), room_for(other):
            pass
        begun.rename(client.cache / "blobs" / "one")
        with room_for(other):
            assert len(notes(client)) == 2
    assert notes(client) == []
    with room_for(coming(client, "large", 8_000)):
        pass


def test_a_file_that_several_want_comes_once(client: HubClient, disk: Disk) -> None:
    one = coming(client, "one", 6_000)
    with room_for(one), room_for(one), room_for(coming(client, "other", 4_000)):
        assert len(notes(client)) == 3


def test_what_a_dead_process_was_to_fetch_is_forgotten(client: HubClient, disk: Disk) -> None:
    folder = client.cache / ".locks" / "raymeld"
    folder.mkdir(parents=True)
    (folder / "dead.json").write_text(json.dumps({"blob": "/blobs/dead", "size": 9_000}))
    with room_for(coming(client, "one", 6_000)):
        assert [path.name for path in notes(client)] != ["dead.json"]
    assert notes(client) == []


def test_where_nothing_can_be_locked_a_file_counts_alone(
    client: HubClient, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError

    monkeypatch.setattr(fcntl, "flock", refuse)
    with room_for(coming(client, "one", 6_000)), room_for(coming(client, "other", 6_000)):
        pass
    with pytest.raises(StorageError, match="no room"), room_for(coming(client, "more", 11_000)):
        pass

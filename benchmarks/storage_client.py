"""What one row of ``benchmarks/storage.py`` or ``hub.py`` runs, in a process of its own.

    python benchmarks/storage_client.py ranges org/name
    python benchmarks/storage_client.py snapshot org/name FOLDER
    python benchmarks/storage_client.py download s3://bucket/base
    python benchmarks/storage_client.py upload s3://bucket/out BYTES...
    python benchmarks/storage_client.py copy s3://bucket/base s3://bucket/out
    python benchmarks/storage_client.py raymeld merge s3://bucket/base ADAPTER --out s3://bucket/out

All but the last are the client library alone, in requests of the same size and as many at a time as
raymeld has, but for a snapshot, which the library fetches in its own way. Prints seconds, requests
to S3 and bytes as JSON.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from merge_core.peaks import Peaks
from merge_core.stores.location import DEFAULT_ACCESS, Location, locate
from merge_core.stores.opening import open_store
from merge_core.stores.s3_client import checksum_of, client_for

REQUEST_BYTES = 8 << 20
CONNECTIONS = 8

_own = threading.local()


class Requests:
    """Counts what passes through a client of botocore."""

    def __init__(self, client: Any) -> None:
        self.by_name: Counter[str] = Counter()
        self.read = 0
        client.meta.events.register("request-created.s3", self._sent)
        client.meta.events.register("after-call.s3.GetObject", self._got)

    def _sent(self, operation_name: str, **_: Any) -> None:
        self.by_name[operation_name] += 1

    def _got(self, parsed: dict[str, Any], **_: Any) -> None:
        self.read += parsed.get("ContentLength", 0)


def main() -> None:
    what, *words = sys.argv[1:]
    rows = (ranges, snapshot, download, upload, copy, raymeld)
    Peaks.start("cpu")
    requests = Requests(client_for(DEFAULT_ACCESS))
    clock = time.perf_counter()
    {row.__name__: row for row in rows}[what](words)
    os.sync()
    said = {
        "seconds": time.perf_counter() - clock,
        "requests": dict(requests.by_name),
        "bytes_read": requests.read,
        "peak_memory": Peaks.since_start("cpu").memory,
        "cpu_seconds": time.process_time(),
    }
    print(json.dumps(said))


def ranges(words: Sequence[str]) -> None:
    """Read every weight file of a model on the hub, and keep nothing."""
    from huggingface_hub import HfApi, get_session, hf_hub_url
    from huggingface_hub.hf_api import RepoFile

    tree = list(HfApi().list_repo_tree(words[0]))
    sizes = {one.path: one.size for one in tree if isinstance(one, RepoFile)}
    session = get_session()

    def fetch(block: tuple[str, int, int]) -> None:
        name, first, nbytes = block
        asked = {"Range": f"bytes={first}-{first + nbytes - 1}"}
        url = hf_hub_url(words[0], name)
        with session.stream("GET", url, headers=asked, follow_redirects=True) as answer:
            got = sum(len(data) for data in answer.iter_raw())
        assert got == nbytes

    blocks = list(_cut((n, size) for n, size in sizes.items() if n.endswith(".safetensors")))
    assert blocks
    with ThreadPoolExecutor(CONNECTIONS) as threads:
        for _ in threads.map(fetch, blocks):
            pass


def snapshot(words: Sequence[str]) -> None:
    """The whole model into a folder, as people fetch one."""
    from huggingface_hub import snapshot_download

    snapshot_download(words[0], local_dir=words[1], max_workers=CONNECTIONS)


def download(words: Sequence[str]) -> None:
    """Read every weight file, and keep nothing."""
    folder = locate(words[0])
    with ThreadPoolExecutor(CONNECTIONS) as threads:
        for _ in threads.map(lambda block: _read(folder, *block), _blocks(folder)):
            pass


def upload(words: Sequence[str]) -> None:
    """Write files of so many bytes."""
    folder, sizes = locate(words[0]), [int(word) for word in words[1:]]
    data = bytearray(REQUEST_BYTES)
    for number, size in enumerate(sizes):
        _upload(folder / f"file-{number}", size, lambda _first, nbytes: memoryview(data)[:nbytes])


def copy(words: Sequence[str], connections: int = CONNECTIONS) -> None:
    """Both at once: what is read is written."""
    source, target = map(locate, words)
    for file in _weights(source):

        def read(first: int, nbytes: int, name: str = file.name) -> memoryview:
            return _read(source, name, first, nbytes)

        _upload(target / file.name, file.size, read, connections)


def raymeld(words: Sequence[str]) -> None:
    """The command itself; its requests are of this process where it merges inline."""
    from cluster.cli import main as command

    sys.argv = ["raymeld", *words]
    try:
        command()
    except SystemExit as ended:
        if ended.code:
            raise


def _weights(folder: Location) -> list[Any]:
    return [file for file in open_store(folder).list() if file.name.endswith(".safetensors")]


def _blocks(folder: Location) -> Iterator[tuple[str, int, int]]:
    return _cut((file.name, file.size) for file in _weights(folder))


def _cut(files: Iterable[tuple[str, int]]) -> Iterator[tuple[str, int, int]]:
    for name, size in files:
        for first in range(0, size, REQUEST_BYTES):
            yield name, first, min(REQUEST_BYTES, size - first)


def _read(folder: Location, name: str, first: int, nbytes: int) -> memoryview:
    """Into the thread's own buffer."""
    if not hasattr(_own, "buffer"):
        _own.buffer = bytearray(REQUEST_BYTES)
    where, view, got = folder / name, memoryview(_own.buffer)[:nbytes], 0
    answer = client_for(where.access).get_object(
        Bucket=where.root, Key=where.path, Range=f"bytes={first}-{first + nbytes - 1}"
    )
    while got < nbytes:
        got += answer["Body"].readinto(view[got:])
    return view


def _upload(where: Location, size: int, read: Any, connections: int = CONNECTIONS) -> None:
    client = client_for(where.access)
    named = {"Bucket": where.root, "Key": where.path}
    named["UploadId"] = client.create_multipart_upload(**named, ChecksumAlgorithm="CRC32")[
        "UploadId"
    ]

    def send(first: int) -> dict[str, Any]:
        body = bytearray(read(first, min(REQUEST_BYTES, size - first)))
        number = first // REQUEST_BYTES + 1
        checked = checksum_of(body, client)
        answer = client.upload_part(**named, PartNumber=number, Body=body, **checked)
        return {"PartNumber": number, "ETag": answer["ETag"]}

    with ThreadPoolExecutor(connections) as threads:
        parts = list(threads.map(send, range(0, size, REQUEST_BYTES)))
    client.complete_multipart_upload(**named, MultipartUpload={"Parts": parts})


if __name__ == "__main__":
    main()

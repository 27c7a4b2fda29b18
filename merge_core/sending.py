"""A finished part onto the hub: read back first, as nobody can read it there before the commit."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator

from merge_core.errors import StorageError, some_of
from merge_core.ledger import TensorRecord
from merge_core.storage import reported
from merge_core.stores.hub_out import SentFile
from merge_core.stores.location import Location, locate
from merge_core.stores.opening import open_hub_out
from merge_core.stores.scratch import ScratchPart
from merge_core.verify import MalformedError, ReadBack, read_back

TICK_SECONDS = 0.2
"""As often as while a shard is merged."""


def send_part(
    out: Location,
    name: str,
    attempt: str,
    part: ScratchPart,
    records: Iterable[TensorRecord],
    tick: Callable[[], None],
) -> str:
    """Finish a part and have the hub hold it; frees its file. Returns the part, for ``publish``.

    Args:
        out: a model on the hub.
        name: of the file that it may become.
        records: what was written.
        tick: called every TICK_SECONDS meanwhile, from another thread; what it raises is raised
            here, at the end.

    Raises:
        StorageError: the scratch does not hold what was written there, or the hub does not take it.
    """
    path, store = part.finish(), open_hub_out(out)
    with _ticking(tick):
        found = _read_back(path, records)
        sent = store.objects.hold(part.path, name)
    if (sent.sha256, sent.size) != (found.sha256, found.size):
        raise _damaged(path, "it was sent as something else")
    part.discard()
    return store.part_of(
        name,
        SentFile(
            part=attempt,
            size=found.size,
            sha256=found.sha256,
            header=found.header,
            digests=found.digests,
        ),
    )


def _read_back(path: str, records: Iterable[TensorRecord]) -> ReadBack:
    """What the file holds, which must be what was written."""
    try:
        with reported(path):
            found = read_back(locate(path))
    except MalformedError as error:
        raise _damaged(path, str(error)) from error
    if wrong := found.changed({record.tensor: record.digest for record in records}):
        raise _damaged(path, some_of(wrong))
    return found


@contextlib.contextmanager
def _ticking(tick: Callable[[], None]) -> Iterator[None]:
    """Ticks while inside: a slow line takes minutes for a shard, and somebody may be watching."""
    ended, errors = threading.Event(), list[BaseException]()

    def run() -> None:
        try:
            while not ended.wait(TICK_SECONDS):
                tick()
        except BaseException as error:  # noqa: BLE001 - handed to the thread that sends
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True, name="sending-tick")
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
    if errors:
        raise errors[0]


def _damaged(path: str, how: str) -> StorageError:
    what = f"what is read back is not what was written: {how}"
    return StorageError(what, path, "Check that disk and the memory, or give another --scratch")

"""A finished part onto the hub: read back first, as nobody can read it there before the commit."""

from __future__ import annotations

from collections.abc import Iterable

from merge_core.errors import StorageError, some_of
from merge_core.ledger import TensorRecord
from merge_core.storage import reported
from merge_core.stores.hub_out import SentFile
from merge_core.stores.location import Location, locate
from merge_core.stores.opening import open_hub_out
from merge_core.stores.scratch import ScratchPart
from merge_core.verify import MalformedError, read_back


def send_part(
    out: Location, name: str, attempt: str, part: ScratchPart, records: Iterable[TensorRecord]
) -> str:
    """Finish a part and have the hub hold it; frees its file. Returns the part, for ``publish``.

    Args:
        out: a model on the hub.
        name: of the file that it may become.
        records: what was written.

    Raises:
        StorageError: the scratch does not hold what was written there, or the hub does not take it.
    """
    path = part.finish()
    try:
        with reported(path):
            found = read_back(locate(part.path))
    except MalformedError as error:
        raise _damaged(path, str(error)) from error
    wrong = [
        record.tensor for record in records if found.digests.get(record.tensor) != record.digest
    ]
    if wrong:
        raise _damaged(path, some_of(wrong))
    store = open_hub_out(out)
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


def _damaged(path: str, how: str) -> StorageError:
    what = f"what is read back is not what was written: {how}"
    return StorageError(what, path, "Check that disk and the memory, or give another --scratch")

"""Tied embeddings and head of which a base stores both, as Qwen1.5-0.5B-Chat was published.

Where the head repeats the embeddings, loaders have one tensor for both. Where it does not, they
disagree: transformers 5 takes the head as it is stored, older releases drop it.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack, closing
from typing import Any

from merge_core.architecture import HEAD, embeddings_among, is_tied
from merge_core.errors import InputError, refuse
from merge_core.plan import MergePlan, Source, StoredHead
from merge_core.stores.opening import fetch, open_store

NOTE = (
    f"{HEAD} repeats the embeddings, to which it is tied, and is left out, as loaders do; merge"
    " compares the two before anything is written"
)

_COMPARED = 16 << 20
"""Bytes at a time; a whole head may have gigabytes."""


def find_stored_head(
    config: Mapping[str, Any], sources: Mapping[str, Source], where: str
) -> StoredHead | None:
    """The head that a tied base stores beside its embeddings; None if it stores one of them.

    Raises:
        InputError: the headers say already that it does not repeat them.
    """
    embeddings = embeddings_among(sources)
    if HEAD not in sources or embeddings is None or not is_tied(config):
        return None
    head, other = sources[HEAD], sources[embeddings]
    mine, its = head.tensor, other.tensor
    how = None
    if head.file is None or other.file is None:
        how = f"beside {embeddings!r}, and one of them is packed"
    elif mine.shape != its.shape:
        how = f"as {list(mine.shape)}, and {embeddings!r} as {list(its.shape)}"
    elif mine.dtype != its.dtype:
        how = f"in {mine.dtype}, and {embeddings!r} in {its.dtype}"
    if how is not None:
        raise _differ(how, where)
    return StoredHead(head=head, embeddings=other)


def check_stored_head(plan: MergePlan) -> None:
    """Compare the head that is left out with the embeddings, byte by byte.

    Raises:
        InputError: they differ.
        StorageError: a file of the base changed since it was planned with.
    """
    if plan.stored_head is None:
        return
    ends = (plan.stored_head.head, plan.stored_head.embeddings)
    with ExitStack() as opened:
        readers = []
        for source in ends:
            if source.file is None:
                raise AssertionError("find_stored_head takes what lies in a file of the base")
            file = plan.base_files[source.file]
            fetch(plan.base, file)
            readers.append(opened.enter_context(closing(open_store(plan.base).open(file))))
        nbytes = ends[0].tensor.nbytes
        for first in range(0, nbytes, _COMPARED):
            size = min(_COMPARED, nbytes - first)
            mine, its = (
                reader.read(source.tensor.offset + first, size)
                for reader, source in zip(readers, ends, strict=True)
            )
            if mine != its:
                how = f"with other values than {ends[1].tensor.name!r}"
                raise _differ(how, str(plan.base))


def _differ(how: str, where: str) -> InputError:
    return refuse(
        f"tie_word_embeddings is set, and {HEAD!r} is stored {how}",
        where,
        "Set tie_word_embeddings to false in config.json if the head is meant, or remove the head",
    )

"""Embeddings and head that share one tensor: whether they still do after the merge.

A base with ``tie_word_embeddings`` holds the embeddings alone, and the head uses them. An adapter
that was trained on one end changes that end alone when the model runs, so the result has two
tensors and says so in its config: this is untying. What an adapter does to both ends alike leaves
them tied.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from merge_core.adapter import Adapter
from merge_core.architecture import HEAD, embeddings_among, is_tied
from merge_core.checkpoint import Checkpoint
from merge_core.matched import Matched
from merge_core.plan import Source, Twins
from merge_core.updates import LowRankUpdate, RowsUpdate, SingleUpdate


def tied_embeddings(checkpoint: Checkpoint) -> str | None:
    """Name of the tensor that is both embeddings and head; None where there is no such tensor."""
    names = checkpoint.sources.keys()
    if HEAD in names or not is_tied(checkpoint.config):
        return None
    return embeddings_among(names)


def settle_ties(
    matched: Matched, embeddings: str, adapters: Sequence[Adapter], *, keep: bool
) -> None:
    """Leave one tensor for both ends, or two.

    Args:
        matched: with both ends, as if they were two tensors.
        embeddings: name of the tensor that is both in the base.
        keep: apply whatever was trained on either end to both.
    """
    _share_saved(matched, embeddings, adapters)
    _share_rows(matched, embeddings)
    _recognise_twins(matched, embeddings, adapters)
    ends = [(matched.sources[n], matched.updates.get(n, [])) for n in (embeddings, HEAD)]
    if ends[0] == ends[1]:
        _drop_head(matched)
        return
    if keep:
        _keep_tied(matched, embeddings)
        return
    matched.config_changes["tie_word_embeddings"] = False
    matched.notes.append(
        f"embeddings and head are untied: they were trained apart, so {HEAD} is written and"
        " tie_word_embeddings becomes false (--keep-tied changes both alike)"
    )


def _drop_head(matched: Matched) -> None:
    del matched.sources[HEAD]
    matched.updates.pop(HEAD, None)


def _keep_tied(matched: Matched, embeddings: str) -> None:
    there = matched.updates.get(embeddings, [])
    touched = [update for update in matched.updates.pop(HEAD, []) if update not in there]
    source, head = matched.sources[embeddings], matched.sources[HEAD]
    if head.adapter is not None and source.adapter is None:
        matched.sources[embeddings] = head
    else:
        _must_equal(matched, source, head)
    for update in touched:
        matched.add(embeddings, update)
    _drop_head(matched)
    matched.notes.append("embeddings and head stay tied: what was trained on one changes both")


def _share_saved(matched: Matched, embeddings: str, adapters: Sequence[Adapter]) -> None:
    """Whole tensors that PEFT saved by itself, as it does after a change of the vocabulary, are
    of the one tensor that both ends were while it trained; so are those of tied modules.
    """
    ends = {name: matched.sources[name] for name in (embeddings, HEAD)}
    shared = {
        name: source
        for name, source in ends.items()
        if source.adapter is not None and _is_shared(name, adapters[source.adapter])
    }
    if not shared:
        return
    first, *others = shared.values()
    for other in others:
        _must_equal(matched, first, other)
    for name, source in ends.items():
        if name in shared or source.adapter is None:
            matched.sources[name] = first


def _is_shared(name: str, adapter: Adapter) -> bool:
    module = name.removesuffix(".weight")
    return not adapter.config.is_saved(module) or adapter.config.ensures_tying


def _share_rows(matched: Matched, embeddings: str) -> None:
    """PEFT gives the tokens of tied embeddings to the head too, and saves them once or twice."""
    rows = [u for u in matched.updates.get(embeddings, []) if isinstance(u, RowsUpdate)]
    heads = {u.adapter: u for u in matched.updates.get(HEAD, []) if isinstance(u, RowsUpdate)}
    for update in rows:
        other = heads.get(update.adapter)
        if other is None:
            matched.add(HEAD, update)
        elif other.tokens == update.tokens:
            twins = Twins(one=(update.adapter, update.rows), other=(other.adapter, other.rows))
            matched.twins.append(twins)
            _exchange(matched, other, update)


def _recognise_twins(matched: Matched, embeddings: str, adapters: Sequence[Adapter]) -> None:
    """With ``ensure_weight_tying`` an adapter brings its factors for both ends, transposed."""
    heads = {u.adapter: u for u in matched.updates.get(HEAD, []) if isinstance(u, LowRankUpdate)}
    for update in matched.updates.get(embeddings, []):
        other = heads.get(update.adapter)
        if not isinstance(update, LowRankUpdate) or other is None:
            continue
        if adapters[update.adapter].config.ensures_tying and other.scaling == update.scaling:
            for mine, its in ((update.a.tensor, other.b.tensor), (update.b.tensor, other.a.tensor)):
                twins = Twins(one=(update.adapter, mine), other=(other.adapter, its))
                matched.twins.append(replace(twins, transposed=True))
            _exchange(matched, other, update)


def _must_equal(matched: Matched, one: Source, other: Source) -> None:
    if one.adapter is not None and other.adapter is not None:
        twins = Twins(one=(one.adapter, one.tensor), other=(other.adapter, other.tensor))
        matched.twins.append(twins)


def _exchange(matched: Matched, old: SingleUpdate, new: SingleUpdate) -> None:
    matched.updates[HEAD] = [new if one is old else one for one in matched.updates[HEAD]]

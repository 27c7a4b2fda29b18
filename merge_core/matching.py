"""What each tensor of the result starts from, and what the adapters do to it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from merge_core.adapter import Adapter
from merge_core.adapter_keys import has_token_rows
from merge_core.checkpoint import Checkpoint
from merge_core.errors import InputError, Problem, gathered, refuse
from merge_core.expert_factors import ExpertFactors
from merge_core.experts import Place, deltas_of, place_of
from merge_core.matched import Matched
from merge_core.orientation import check_mergeable, is_transposed
from merge_core.plan import Source
from merge_core.trained import LowRankPair, TokenRows
from merge_core.updates import (
    DoraUpdate,
    LowRankUpdate,
    RowsUpdate,
    ShiftUpdate,
)
from merge_core.whole_tensors import no_such, no_weight, replace_whole

_OTHER_BASE = "Give the base that this adapter was trained on"


def match(
    bases: Mapping[str, Source],
    checkpoint: Checkpoint,
    adapters: Sequence[Adapter],
    problems: list[Problem],
) -> Matched:
    """Find the base tensor of everything that the adapters trained.

    Args:
        bases: by name, both ends of tied ones.
        problems: takes everything that fits nowhere.
    """
    decodings = checkpoint.decodings
    matched = Matched.of(bases, None if decodings is None else decodings.dtype)
    model = checkpoint.config.get("model_type")
    for number in range(len(adapters)):
        with gathered(problems):
            replace_whole(matched, bases, number, adapters, model)
    for number, adapter in enumerate(adapters):
        missing = []
        for module, pair in adapter.trained.pairs.items():
            place = place_of(f"{module}.weight", matched.sources, model)
            if place is None:
                missing.append(f"{module}.weight")
                continue
            with gathered(problems):
                _update(matched, number, adapter, (module, pair, place), checkpoint)
        problems += no_such(missing, adapter)
        for parameter, factors in adapter.trained.experts.items():
            with gathered(problems):
                _update_experts(matched, number, adapter, (parameter, factors), model)
        for module, rows in adapter.trained.tokens.items():
            with gathered(problems):
                _put_rows(matched, number, adapter, module, rows)
    return matched


def check_together(matched: Matched) -> None:
    """Make sure that what was trained of several tensors, or by several adapters, fits together.

    Raises:
        InputError: it does not.
    """
    problems = []
    rows = {
        name: source.tensor.shape[0]
        for name, source in matched.sources.items()
        if len(source.tensor.shape) == 2 and has_token_rows(name.removesuffix(".weight"))
    }
    if "vocab_size" in matched.config_changes and len(set(rows.values())) > 1:
        what = f"the vocabulary is resized at one end only: {rows}"
        problems.append(Problem(what, "ADAPTER", "Save the adapter with both of them"))
    for name, updates in matched.updates.items():
        kinds = {isinstance(update, RowsUpdate) for update in updates}
        if len(kinds) > 1:
            what = "some of its rows are replaced, and others add to the whole of it"
            one = len({update.adapter for update in updates}) == 1
            remedy = "Merge one of these adapters"
            if one:  # on tied ends: PEFT trains no module both ways
                remedy = "Train either tokens or factors of embeddings and head that are tied"
            problems.append(Problem(what, f"tensor {name}", remedy))
    if problems:
        raise InputError(problems)


def _update(
    matched: Matched,
    number: int,
    adapter: Adapter,
    found: tuple[str, LowRankPair, Place],
    checkpoint: Checkpoint,
) -> None:
    module, pair, place = found
    name, at = place.name, f"{adapter.path}, module {module}"
    check_mergeable(place.tensor, at)
    transposed = _is_transposed(module, pair, place, adapter, checkpoint)
    weight = 1.0 if pair.magnitude else adapter.weight
    delta = LowRankUpdate(
        adapter=number,
        a=pair.a,
        b=pair.b,
        scaling=pair.scaling * weight,
        transposed=transposed,
    )
    if place.first is not None:
        if pair.magnitude is not None:
            what = f"DoRA on one expert of the fused tensor {name!r} is not merged"
            raise refuse(what, at, "Give a base with a tensor for each expert")
        matched.add_to_rows(name, place.first, delta, at)
    elif pair.magnitude is None:
        matched.add(name, delta)
    else:
        matched.add(name, DoraUpdate(delta=delta, magnitude=pair.magnitude, weight=adapter.weight))
    if pair.shift is not None:
        _shift(matched, number, adapter, module, pair)


def _is_transposed(
    module: str, pair: LowRankPair, place: Place, adapter: Adapter, checkpoint: Checkpoint
) -> bool:
    """Whether the base stores [in, out]."""
    at, delta = f"{adapter.path}, module {module}", (pair.b.shape[0], pair.a.shape[1])
    if pair.embedding or adapter.config.is_parameter(f"{module}.weight"):
        # PEFT takes a parameter as it lies, whatever its module is.
        shape = delta[::-1] if pair.embedding else delta
        if place.shape != shape:
            what = f"the delta is {list(shape)}, the base tensor {list(place.shape)}"
            raise refuse(what, at, _OTHER_BASE)
        return pair.embedding
    if "embed" in module.rpartition(".")[2]:
        what = "has linear factors on an embedding, which PEFT never writes"
        raise refuse(what, at, "Save the adapter again with PEFT")
    return is_transposed(place.shape, delta, adapter, checkpoint, at)


def _update_experts(
    matched: Matched,
    number: int,
    adapter: Adapter,
    found: tuple[str, ExpertFactors],
    model: object,
) -> None:
    parameter, factors = found
    at = f"{adapter.path}, parameter {parameter}"
    for one in deltas_of(parameter, factors, matched.sources, adapter.config, model):
        place = place_of(one.weight, matched.sources, model)
        size = (one.b.shape[0], one.a.shape[1])
        if place is None or place.shape != (size[::-1] if one.transposed else size):
            raise refuse(f"the base has no {one.weight} of that shape", at, _OTHER_BASE)
        check_mergeable(place.tensor, at)
        delta = LowRankUpdate(
            adapter=number,
            a=one.a,
            b=one.b,
            scaling=factors.scaling * adapter.weight,
            transposed=one.transposed,
        )
        if place.first is None:
            matched.add(place.name, delta)
        else:
            matched.add_to_rows(place.name, place.first, delta, at)


def _shift(matched: Matched, number: int, adapter: Adapter, module: str, pair: LowRankPair) -> None:
    name, at = f"{module}.bias", f"{adapter.path}, module {module}"
    if name not in matched.sources:
        what = "lora_bias is set, and the base has no bias there that could take it"
        raise refuse(what, at, "Train without lora_bias; PEFT cannot merge this either")
    base = matched.sources[name].tensor
    if pair.shift is None or base.shape != pair.shift.shape:
        raise refuse(f"the base's bias is {list(base.shape)}", at, _OTHER_BASE)
    scaling = pair.scaling * adapter.weight
    matched.add(name, ShiftUpdate(adapter=number, vector=pair.shift, scaling=scaling))


def _put_rows(
    matched: Matched, number: int, adapter: Adapter, module: str, found: TokenRows
) -> None:
    name, at = f"{module}.weight", f"{adapter.path}, module {module}"
    if name not in matched.sources:
        raise InputError(no_such([name], adapter))
    base = matched.sources[name].tensor
    check_mergeable(base, at)
    if adapter.weight != 1:
        raise no_weight(adapter, found.rows.name)
    if len(base.shape) != 2 or base.shape[1] != found.rows.shape[1]:
        what = f"its rows are {list(found.rows.shape)}, the base tensor {list(base.shape)}"
        raise refuse(what, at, _OTHER_BASE)
    if max(found.tokens) >= base.shape[0]:
        what = f"token {max(found.tokens)} is none of the base's {base.shape[0]}"
        raise refuse(what, at, _OTHER_BASE)
    twice = set(found.tokens) & set(_put_by_others(matched, name))
    if twice:
        what = f"token {min(twice)} is trained by another adapter as well"
        raise refuse(what, at, "Merge one of the adapters that train it")
    matched.add(name, RowsUpdate(adapter=number, rows=found.rows, tokens=found.tokens))


def _put_by_others(matched: Matched, name: str) -> Iterator[int]:
    for update in matched.updates.get(name, ()):
        if isinstance(update, RowsUpdate):
            yield from update.tokens

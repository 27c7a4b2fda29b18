"""Tensors that an adapter brings as a whole: what each of them takes the place of in the base."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from merge_core.adapter import Adapter
from merge_core.adapter_keys import has_token_rows
from merge_core.errors import InputError, Problem, gathered, refuse, some_of
from merge_core.experts import is_parameter_of_experts, pieces_of
from merge_core.layout import TensorSpec
from merge_core.matched import Matched
from merge_core.orientation import check_mergeable
from merge_core.plan import Source, Twins

_OTHER_BASE = "Give the base that this adapter was trained on"


def replace_whole(
    matched: Matched,
    bases: Mapping[str, Source],
    number: int,
    adapters: Sequence[Adapter],
    model: object,
) -> None:
    """Have the tensors that adapter ``number`` brings as a whole take the place of the base's.

    Args:
        bases: by name, both ends of tied ones.
        model: ``model_type`` of the base.

    Raises:
        InputError: with every tensor that fits nowhere, or beside others of the same place.
    """
    adapter = adapters[number]
    missing: list[str] = []
    problems: list[Problem] = []
    for name, saved in adapter.trained.whole.items():
        if name not in bases and not is_parameter_of_experts(name):
            missing.append(name)
            continue
        with gathered(problems):
            if adapter.weight != 1 and name.removesuffix(".weight") not in adapter.trained.layers:
                raise no_weight(adapter, saved.name)
            for place, source in _sources_of(name, saved, number, bases, model):
                at = f"{adapter.path}, tensor {saved.name!r}"
                check_mergeable(bases[place].tensor, at)
                _check_shape(matched, source.tensor, bases[place].tensor, at)
                _put(matched, place, source, adapters)
    matched.twins += [
        Twins(one=(number, one), other=(number, other)) for one, other in adapter.trained.twins
    ]
    problems += no_such(missing, adapter)
    if problems:
        raise InputError(problems)


def _sources_of(
    name: str, saved: TensorSpec, number: int, bases: Mapping[str, Source], model: object
) -> Iterator[tuple[str, Source]]:
    """The tensors of the base, each with what takes its place."""
    if name in bases:
        yield name, Source(tensor=saved, file=None, adapter=number)
        return
    for weight, piece in pieces_of(name, saved, bases, model):
        yield weight, Source(tensor=piece, file=None, adapter=number, within=saved)


def _check_shape(matched: Matched, brought: TensorSpec, base: TensorSpec, at: str) -> None:
    if brought.shape == base.shape:
        return
    rows = len(base.shape) == 2 and has_token_rows(base.name.removesuffix(".weight"))
    if rows and len(brought.shape) == 2 and brought.shape[0] and brought.shape[1] == base.shape[1]:
        matched.config_changes["vocab_size"] = brought.shape[0]
        return
    what = f"is {list(brought.shape)}, the base tensor {list(base.shape)}"
    raise refuse(what, at, _OTHER_BASE)


def _put(matched: Matched, place: str, source: Source, adapters: Sequence[Adapter]) -> None:
    """Have ``source`` take that place, or be the same as what another adapter has put there."""
    earlier = matched.sources[place]
    if earlier.adapter is None or source.adapter is None:
        matched.sources[place] = source
        return
    one, other = earlier.within or earlier.tensor, source.within or source.tensor
    if one.shape != other.shape:
        what = f"is {list(other.shape)}, and {list(one.shape)} in {adapters[earlier.adapter].path}"
        at = f"{adapters[source.adapter].path}, tensor {other.name!r}"
        raise refuse(what, at, "Merge adapters of one vocabulary, whose experts are saved alike")
    twins = Twins(one=(earlier.adapter, one), other=(source.adapter, other))
    if twins not in matched.twins:  # of experts there are many pieces
        matched.twins.append(twins)


def no_weight(adapter: Adapter, name: str) -> InputError:
    """The refusal of a weight on an adapter that brings whole values."""
    return refuse(
        f"brings whole values, which cannot count {adapter.weight:g} times",
        f"{adapter.path}, tensor {name!r}",
        "Leave the weight of this adapter out",
    )


def no_such(missing: Sequence[str], adapter: Adapter) -> list[Problem]:
    """One problem for all tensors that the base lacks."""
    if not missing:
        return []
    what = f"the base has no {some_of(missing)}"
    return [Problem(what, str(adapter.path), _OTHER_BASE)]

"""What each tensor of the result starts from, and what the adapters do to it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from merge_core.adapter import Adapter
from merge_core.checkpoint import Checkpoint
from merge_core.errors import InputError, Problem, gathered, refuse, some_of
from merge_core.layout import TensorSpec
from merge_core.orientation import check_mergeable, is_transposed
from merge_core.plan import Source, Twins
from merge_core.trained import LowRankPair, TokenRows, has_token_rows
from merge_core.updates import DoraUpdate, LowRankUpdate, RowsUpdate, ShiftUpdate, Update
from merge_core.updates.tuning import Tuning

_OTHER_BASE = "Give the base that this adapter was trained on"


@dataclass(slots=True)
class Matched:
    """The tensors of the result by name, before they are cut into shards."""

    sources: dict[str, Source]
    dtypes: dict[str, str]
    """Of the base's tensors, whatever an adapter brings in their place."""
    updates: dict[str, list[Update]] = field(default_factory=dict)
    """In the order of the adapters."""
    twins: list[Twins] = field(default_factory=list)
    """Tensors of adapters that must be the same."""
    config_changes: dict[str, Any] = field(default_factory=dict)
    """Fields of config.json that the adapters change."""
    notes: list[str] = field(default_factory=list)
    tunings: dict[int, Tuning] = field(default_factory=dict)
    """By the number of the adapter: what PEFT is to merge."""

    @classmethod
    def of(cls, bases: Mapping[str, Source]) -> Matched:
        """The base as it is."""
        dtypes = {name: source.tensor.dtype for name, source in bases.items()}
        return cls(sources=dict(bases), dtypes=dtypes)

    def add(self, name: str, update: Update) -> None:
        """Have a tensor updated."""
        self.updates.setdefault(name, []).append(update)


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
    matched = Matched.of(bases)
    for number, adapter in enumerate(adapters):
        with gathered(problems):
            _replace(matched, bases, number, adapter)
    for number, adapter in enumerate(adapters):
        missing = []
        for module, pair in adapter.trained.pairs.items():
            if f"{module}.weight" not in matched.sources:
                missing.append(f"{module}.weight")
                continue
            with gathered(problems):
                _update(matched, number, adapter, module, pair, checkpoint)
        problems += _no_such(missing, adapter)
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
            problems.append(Problem(what, f"tensor {name}", "Merge one of these adapters"))
    if problems:
        raise InputError(problems)


def _replace(matched: Matched, bases: Mapping[str, Source], number: int, adapter: Adapter) -> None:
    """Have the tensors that an adapter brings as a whole take the place of the base's."""
    missing: list[str] = []
    problems: list[Problem] = []
    for name, saved in adapter.trained.whole.items():
        base = bases.get(name)
        if base is None:
            missing.append(name)
            continue
        with gathered(problems):
            check_mergeable(base.tensor, f"{adapter.path}, tensor {saved.name!r}")
            _check_shape(matched, adapter, saved, base.tensor)
            beside_factors = name.removesuffix(".weight") in adapter.trained.layers
            if adapter.weight != 1 and not beside_factors:
                raise _no_weight(adapter, saved.name)
            earlier = matched.sources[name]
            if earlier.adapter is not None:
                matched.twins.append(
                    Twins(one=(earlier.adapter, earlier.tensor), other=(number, saved))
                )
            else:
                matched.sources[name] = Source(tensor=saved, file=None, adapter=number)
    matched.twins += [
        Twins(one=(number, one), other=(number, other)) for one, other in adapter.trained.twins
    ]
    problems += _no_such(missing, adapter)
    if problems:
        raise InputError(problems)


def _check_shape(matched: Matched, adapter: Adapter, saved: TensorSpec, base: TensorSpec) -> None:
    if saved.shape == base.shape:
        return
    rows = len(base.shape) == 2 and has_token_rows(base.name.removesuffix(".weight"))
    if rows and len(saved.shape) == 2 and saved.shape[0] and saved.shape[1] == base.shape[1]:
        matched.config_changes["vocab_size"] = saved.shape[0]
        return
    what = f"is {list(saved.shape)}, the base tensor {list(base.shape)}"
    raise refuse(what, f"{adapter.path}, tensor {saved.name!r}", _OTHER_BASE)


def _no_weight(adapter: Adapter, name: str) -> InputError:
    return refuse(
        f"brings whole values, which cannot count {adapter.weight:g} times",
        f"{adapter.path}, tensor {name!r}",
        "Leave the weight of this adapter out",
    )


def _no_such(missing: Sequence[str], adapter: Adapter) -> list[Problem]:
    if not missing:
        return []
    what = f"the base has no {some_of(missing)}"
    return [Problem(what, str(adapter.path), _OTHER_BASE)]


def _update(
    matched: Matched,
    number: int,
    adapter: Adapter,
    module: str,
    pair: LowRankPair,
    checkpoint: Checkpoint,
) -> None:
    name, at = f"{module}.weight", f"{adapter.path}, module {module}"
    base = matched.sources[name].tensor
    check_mergeable(base, at)
    if pair.embedding:
        transposed = True
        shape = (pair.a.shape[1], pair.b.shape[0])
        if base.shape != shape:
            what = f"the delta is {list(shape)}, the base tensor {list(base.shape)}"
            raise refuse(what, at, _OTHER_BASE)
    elif "embed" in module.rpartition(".")[2]:
        what = "has linear factors on an embedding, which PEFT never writes"
        raise refuse(what, at, "Save the adapter again with PEFT")
    else:
        transposed = is_transposed(base, pair.a, pair.b, adapter, checkpoint, at)
    weight = 1.0 if pair.magnitude else adapter.weight
    delta = LowRankUpdate(
        adapter=number,
        a=pair.a,
        b=pair.b,
        scaling=pair.scaling * weight,
        transposed=transposed,
    )
    if pair.magnitude is None:
        matched.add(name, delta)
    else:
        matched.add(name, DoraUpdate(delta=delta, magnitude=pair.magnitude, weight=adapter.weight))
    if pair.shift is not None:
        _shift(matched, number, adapter, module, pair)


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
        raise InputError(_no_such([name], adapter))
    base = matched.sources[name].tensor
    check_mergeable(base, at)
    if adapter.weight != 1:
        raise _no_weight(adapter, found.rows.name)
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

"""The tensors of a tuner other than LoRA: which layer each belongs to, and what is missing."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from merge_core.adapter_keys import PREFIX
from merge_core.errors import Problem, some_of
from merge_core.layout import TensorSpec
from merge_core.peft_tuners import TUNERS
from merge_core.tuner import Form, Tuner

_MODEL = "base_model."
_REPAIR = "Save the adapter again with PEFT; the file is damaged or incomplete"
_SIZE = re.compile(r"(?P<times>\d*)(?P<name>[A-Za-z_]\w*)?(?:/(?P<divisor>\w+))?")

_NUMBERED = re.compile(r"\{(\w+)\}")

_DTYPES = ("F32", "F16", "BF16", "U8", "I8", "I16", "I32", "I64")
"""Integers are places of values; PEFT takes those that it can count with."""

Parts = Mapping[str, TensorSpec]
"""By what the tuner calls them."""

Sizes = dict[str, int]
"""What the names in a form mean."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuned:
    """What an adapter's file holds for a tuner other than LoRA."""

    layers: Mapping[str, Parts] = field(default_factory=dict)
    """By the path of the module."""
    shared: Parts = field(default_factory=dict)


def take_tuned(tensors: Sequence[TensorSpec], peft_type: str) -> tuple[Tuned, list[TensorSpec]]:
    """What is the tuner's own, and the tensors that are not."""
    tuner = TUNERS.get(peft_type)
    if tuner is None:
        return Tuned(), list(tensors)
    names = {name for group in tuner.groups for form in group for name in form}
    own = re.compile(rf"{re.escape(PREFIX)}(.+?)\.({'|'.join(map(_any_number, names))})")
    layers: dict[str, dict[str, TensorSpec]] = {}
    shared, others = {}, []
    for tensor in tensors:
        rest = tensor.name.removeprefix(_MODEL)
        if match := own.fullmatch(tensor.name):
            layers.setdefault(match[1], {})[match[2]] = tensor
        elif rest != tensor.name and any(_is_called(rest, name) for name in tuner.shared):
            shared[rest] = tensor
        else:
            others.append(tensor)
    return Tuned(layers=layers, shared=shared), others


def _any_number(name: str) -> str:
    """A pattern for what a form calls a tensor."""
    return r"\d+".join(map(re.escape, _NUMBERED.split(name)[::2]))


def odd_dtypes(tuned: Tuned, where: str) -> Iterator[Problem]:
    """Tensors of a tuner that are of no dtype that is read."""
    for tensor in (*tuned.shared.values(), *chain(*(p.values() for p in tuned.layers.values()))):
        if tensor.dtype not in _DTYPES:
            what = f"{tensor.name} is {tensor.dtype}, not one of {', '.join(_DTYPES)}"
            yield Problem(what, where, "Cast the adapter to one of them")


def check_shared(shared: Parts, tuner: Tuner, config: Mapping[str, Any], sizes: Sizes) -> None:
    """Make sure that what belongs to no layer is complete; notes in ``sizes`` what it tells.

    Raises:
        MismatchError: it is not.
    """
    optional = config.get("save_projection") is False
    for name, shape in tuner.shared.items():
        found = [tensor for key, tensor in shared.items() if _is_called(key, name)]
        if not found and not optional:
            raise MismatchError(f"{_MODEL}{name} is missing")
        for number, tensor in enumerate(found):
            if name.endswith("*") and f"{name[:-1]}{number}" not in shared:
                raise MismatchError(f"{_MODEL}{name[:-1]}{number} is missing")
            _check_form({name: shape}, {name: tensor}, sizes)


class MismatchError(ValueError):
    """Why the tensors of a layer are not those of its tuner."""


def check_parts(parts: Parts, tuner: Tuner, sizes: Sizes) -> None:
    """Make sure that a layer has one form of each group, of the right shapes.

    Args:
        sizes: what the names in the forms mean; ``in`` and ``out`` of the layer among them.

    Raises:
        MismatchError: it has not.
    """
    left = set(parts)
    for group in tuner.groups:
        spelt = [_spelt_out(form, sizes, len(parts)) for form in group]
        forms = [form for form in spelt if form.keys() <= parts.keys()]
        if not forms:
            lacking = min((form.keys() - parts.keys() for form in spelt), key=len)
            raise MismatchError(f"{some_of(sorted(lacking))} is missing")
        most = max(len(form) for form in forms)
        forms = [form for form in forms if len(form) == most]
        _check_any(forms, parts, sizes)
        left -= forms[0].keys()
    if left:
        raise MismatchError(f"{some_of(sorted(left))} is there without what belongs to it")


def _spelt_out(form: Form, sizes: Sizes, there: int) -> Form:
    """With the names of tensors that are numbered, at most one more than are ``there``."""
    names: dict[str, str] = {}
    for name, shape in form.items():
        counted = _NUMBERED.search(name)
        if counted is None:
            names[name] = shape
            continue
        for number in range(min(sizes.get(counted[1], 0), there + 1)):
            names[name.replace(counted[0], str(number))] = shape.replace("#", str(number))
    return names


def unlike_others(layers: Mapping[str, Parts], tuner: Tuner) -> Iterator[tuple[str, list[str]]]:
    """Layers that lack what all others have, where a layer could be complete without it.

    The config, which is one for all layers, decides whether such tensors are there.
    """
    for group in tuner.groups:
        for form in group:
            for less in (less for less in group if less.keys() < form.keys()):
                more = form.keys() - less.keys()
                lacking = [path for path, parts in layers.items() if not more & parts.keys()]
                if 0 < len(lacking) < len(layers):
                    yield from ((path, sorted(more)) for path in lacking)


def _check_any(forms: Sequence[Form], parts: Parts, sizes: Sizes) -> None:
    said = []
    for form in forms:
        tried = dict(sizes)
        try:
            _check_form(form, parts, tried)
        except MismatchError as mismatch:
            said.append(str(mismatch))
            continue
        sizes |= tried
        return
    raise MismatchError(" and ".join(dict.fromkeys(said)))


def _check_form(form: Form, parts: Parts, sizes: Sizes) -> None:
    for name, shape in form.items():
        if len(parts[name].shape) != len(shape.split()):
            raise _wrong(parts[name], shape, sizes)
        for size, word in zip(parts[name].shape, shape.split(), strict=True):
            if word.isidentifier():  # the first that is met says what it means
                sizes.setdefault(word, size)
    for name, shape in form.items():
        wanted = [_size(word, sizes) for word in shape.split()]
        pairs = zip(parts[name].shape, wanted, strict=True)
        if 0 in parts[name].shape or any(w not in (None, size) for size, w in pairs):
            raise _wrong(parts[name], shape, sizes)


def _size(word: str, sizes: Sizes) -> int | None:
    """What a word in a shape means; None if it cannot be told."""
    if word.isdigit():
        return int(word)
    match = _SIZE.fullmatch(word)
    if match is None:
        raise AssertionError(f"{word!r} is no size")
    size, divisor = sizes.get(match["name"]), sizes.get(match["divisor"] or "", 1)
    if size is None or divisor < 1:
        return None
    return int(match["times"] or 1) * size // divisor


def _wrong(tensor: TensorSpec, shape: str, sizes: Sizes) -> MismatchError:
    known = {word: size for word in shape.split() if (size := _size(word, sizes)) is not None}
    means = ", ".join(f"{word} = {size}" for word, size in known.items() if str(size) != word)
    what = f"{tensor.name!r} has shape {list(tensor.shape)}, not [{', '.join(shape.split())}]"
    return MismatchError(what + f" with {means}" * bool(means))


def _is_called(key: str, name: str) -> bool:
    """Whether ``name``, which may end with a star, is that of a tensor."""
    return (
        key.startswith(name[:-1]) and key[len(name) - 1 :].isdigit()
        if name.endswith("*")
        else key == name
    )

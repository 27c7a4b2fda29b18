"""What trainers leave behind: which folder of it is the adapter that is meant.

    my-lora/                       adapter_config.json and adapter_model.safetensors: the adapter
    my-lora/checkpoint-500/        a Trainer's checkpoint, an adapter as well
    my-lora/style/                 PEFT saves each adapter that is not called "default" like that
    output/v0-20240601-101010/     of ms-swift: nothing but checkpoints

A folder that is an adapter is taken, as PEFT does, whatever lies below it. One that is none is
taken for the single adapter below it. Of several none is guessed: not even the last checkpoint.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from merge_core.adapter import (
    CONFIG,
    PICKLE,
    SAFETENSORS,
    Adapter,
    AdapterWord,
    open_adapter,
    parse_adapter,
)
from merge_core.errors import InputError, StorageError, refuse, some_of
from merge_core.folders import names_in, pinned
from merge_core.stores.location import DEFAULT_ACCESS, Access, Location, Place
from merge_core.stores.opening import open_store

OWN = "default"
"""What PEFT calls the adapter that lies in the folder itself."""

_TRAINED_BESIDE = ("non_lora_trainables.bin", "trainable_params.bin", "vit.safetensors")
"""Where LLaVA's trainer, LongLoRA's and ms-swift keep weights that they trained beside LoRA."""

_VALUE_HEADS = ("value_head.safetensors", "value_head.bin")
"""Where LLaMA-Factory and ms-swift keep the head of a reward model or of PPO."""

_UNCONVERTED = ("pissa_init", "pissa_backup", "initial_model")
"""Where LLaMA-Factory (the first two) and ms-swift keep adapters of PiSSA, OLoRA or LoRA-GA as they
began, and LLaMA-Factory as they ended, for PEFT to convert. It wants these with
``init_lora_weights`` true, so their configs call plain what belongs to a changed base."""

_BASE_WEIGHTS = re.compile(r"model\.safetensors(\.index\.json)?|pytorch_model[^/]*\.bin")


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """An adapter among what a trainer left."""

    path: Location
    """Its own folder."""
    given: Location
    """The one that was named, which may hold the tokenizer."""
    notes: tuple[str, ...] = ()


def choose_adapter(given: Location, name: str | None = None) -> Chosen:
    """The adapter that is meant by the folder ``given``.

    Args:
        name: of a folder in it, or ``default`` for the adapter in the folder itself.

    Raises:
        InputError: it holds several and none was chosen, none of that name, weights that are no
            part of any adapter, or one that is not converted.
    """
    names = names_in(given, "ADAPTER", CONFIG)
    inner, notes = _among(given, names, name)
    path, before = (given / inner, f"{inner}/") if inner else (given, "")
    if path.name in _UNCONVERTED:
        what = (
            f"trainers call {path.name} an adapter of PiSSA or its like that is not converted: it"
            " belongs to a base that was changed for it, though its config does not say so"
        )
        remedy = "Merge what was converted (pissa_converted, converted), or rename this folder"
        raise refuse(what, str(path), f"{remedy} if it is plain LoRA")
    beside = [file for file in _TRAINED_BESIDE if before + file in names]
    if beside:
        what = f"{some_of(beside)} holds weights that were trained beside the adapter"
        raise refuse(what, str(path), "Merge with the tool that trained it")
    notes += [
        f"{path / head} is left out: the result is the language model alone, without a value head"
        for head in _VALUE_HEADS
        if before + head in names
    ]
    return Chosen(path=path, given=given, notes=tuple(notes))


def open_named(
    word: AdapterWord, name: str | None = None, access: Access = DEFAULT_ACCESS
) -> Adapter:
    """Open the adapter that ``path`` or ``path@0.5`` means, see ``choose_adapter``.

    Raises:
        InputError: with every problem of it.
    """
    place, weight = parse_adapter(word, access)
    chosen = choose_adapter(pinned(place), name)
    adapter = open_adapter(chosen.path, weight, chosen.given)
    return replace(adapter, notes=(*chosen.notes, *adapter.notes))


def split_words(
    words: Sequence[str], access: Access = DEFAULT_ACCESS
) -> tuple[Place | None, Sequence[AdapterWord]]:
    """Base and adapters among the words of a command: ``[BASE] ADAPTER[@WEIGHT]...``.

    Returns:
        None as the base, if the first word is an adapter already.

    Raises:
        InputError: the first word is no place.
    """
    first, *others = words
    names = _seen_in(parse_adapter(first, access)[0])
    if others:
        adapter_first = _lead_to_adapter(names)
    else:
        adapter_first = CONFIG in names or not _has_base_weights(names)
    return (None, words) if adapter_first else (first, others)


def _seen_in(folder: Location) -> frozenset[str]:
    """The files in it and below; none where it cannot be looked into, as who opens it will say."""
    try:
        return frozenset(listed.name for listed in open_store(pinned(folder)).list())
    except (InputError, StorageError):
        return frozenset()


def _lead_to_adapter(names: Collection[str]) -> bool:
    """Whether a folder with these files is the output of a trainer rather than a base."""
    if _has_base_weights(names):
        return False
    return CONFIG in names or any(map(_is_config_below, names))


def _among(given: Location, names: Collection[str], name: str | None) -> tuple[str, list[str]]:
    """The folder in ``given`` that is meant, empty for itself, and what is to be said of it."""
    own, begun, found = _is_adapter("", names), CONFIG in names, _adapters_below(names)
    below = [folder for folder in found if folder not in _UNCONVERTED]
    if name is not None:
        if name == OWN and (own or OWN not in below):
            return "", []
        if name in found:
            return name, []
        there = [*[OWN] * own, *below]
        what = f"holds no adapter {name!r}" + (f", but {', '.join(there)}" if there else "")
        raise refuse(what, str(given), "Take one of these, or leave --adapter-name out")
    if own:
        left = f"{given}: its own adapter is merged; {some_of(below)} in it"
        return "", [f"{left} not (--adapter-name merges such a one)"] * bool(below)
    if not below:
        return "", []  # which is refused when it is opened
    if len(below) == 1 and not begun:
        return below[0], [f"{given}: the one adapter in it is {below[0]}"]
    what = f"holds {len(below)} adapters: {', '.join(below)}"
    if begun:  # axolotl writes the config before it trains
        what = f"has an {CONFIG} without weights: its training did not end. It {what}"
    raise refuse(what, str(given), f"Choose with --adapter-name, such as {below[-1]}")


def _adapters_below(names: Collection[str]) -> list[str]:
    """Names of the folders that are adapters, checkpoints by their steps."""
    folders = [name.rpartition("/")[0] for name in names if _is_config_below(name)]
    return sorted((f for f in folders if _is_adapter(f"{f}/", names)), key=_by_step)


def _is_config_below(name: str) -> bool:
    return name.endswith(f"/{CONFIG}") and name.count("/") == 1


def _by_step(name: str) -> tuple[str, int, str]:
    number = re.search(r"(\d+)$", name)
    return (name[: number.start()], int(number[1]), name) if number else (name, 0, name)


def _is_adapter(before: str, names: Collection[str]) -> bool:
    has_weights = before + SAFETENSORS in names or before + PICKLE in names
    return before + CONFIG in names and has_weights


def _has_base_weights(names: Collection[str]) -> bool:
    return any(map(_BASE_WEIGHTS.fullmatch, names))

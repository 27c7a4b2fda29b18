"""What trainers leave behind: which directory of it is the adapter that is meant.

    my-lora/                       adapter_config.json and adapter_model.safetensors: the adapter
    my-lora/checkpoint-500/        a Trainer's checkpoint, an adapter as well
    my-lora/style/                 PEFT saves each adapter that is not called "default" like that
    output/v0-20240601-101010/     of ms-swift: nothing but checkpoints

A directory that is an adapter is taken, as PEFT does, whatever lies below it. One that is none is
taken for the single adapter below it. Of several none is guessed: not even the last checkpoint.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from merge_core.adapter import (
    CONFIG,
    PICKLE,
    SAFETENSORS,
    Adapter,
    AdapterWord,
    open_adapter,
    parse_adapter,
)
from merge_core.errors import refuse, some_of

OWN = "default"
"""What PEFT calls the adapter that lies in the directory itself."""

_TRAINED_BESIDE = ("non_lora_trainables.bin", "trainable_params.bin", "vit.safetensors")
"""Where LLaVA's trainer, LongLoRA's and ms-swift keep weights that they trained beside LoRA."""

_VALUE_HEADS = ("value_head.safetensors", "value_head.bin")
"""Where LLaMA-Factory and ms-swift keep the head of a reward model or of PPO."""

_BASE_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model*.bin")


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """An adapter among what a trainer left."""

    path: Path
    """Its own directory."""
    given: Path
    """The one that was named, which may hold the tokenizer."""
    notes: tuple[str, ...] = ()


def choose_adapter(given: Path, name: str | None = None) -> Chosen:
    """The adapter that is meant by directory ``given``.

    Args:
        name: of a folder in it, or ``default`` for the adapter in the directory itself.

    Raises:
        InputError: it holds several and none was chosen, none of that name, or weights that are no
            part of any adapter.
    """
    below = _adapters_below(given)
    path, notes = _among(given, below, name)
    beside = [file for file in _TRAINED_BESIDE if (path / file).exists()]
    if beside:
        what = f"{some_of(beside)} holds weights that were trained beside the adapter"
        raise refuse(what, str(path), "Merge with the tool that trained it")
    notes += [
        f"{path / head} is left out: the result is the language model alone, without a value head"
        for head in _VALUE_HEADS
        if (path / head).exists()
    ]
    return Chosen(path=path, given=given, notes=tuple(notes))


def open_named(text: AdapterWord, name: str | None = None) -> Adapter:
    """Open the adapter that ``path`` or ``path@0.5`` means, see ``choose_adapter``.

    Raises:
        InputError: with every problem of it.
    """
    path, weight = parse_adapter(text)
    chosen = choose_adapter(path.absolute(), name)
    adapter = open_adapter(chosen.path, weight, chosen.given)
    return replace(adapter, notes=(*chosen.notes, *adapter.notes))


def split_words(words: Sequence[str]) -> tuple[str | None, list[str]]:
    """Base and adapters among the words of a command: ``[BASE] ADAPTER[@WEIGHT]...``.

    Returns:
        None as the base, if the first word is an adapter already.
    """
    first, *others = words
    path, _ = parse_adapter(first)
    if others:
        adapter_first = leads_to_adapter(path)
    else:
        adapter_first = os.path.isfile(path / CONFIG) or not _has_base_weights(path)
    return (None, list(words)) if adapter_first else (first, others)


def leads_to_adapter(path: Path) -> bool:
    """Whether ``path`` is the output of a trainer rather than a base."""
    if not os.path.isdir(path) or _has_base_weights(path):
        return False
    return os.path.isfile(path / CONFIG) or any(path.glob(f"*/{CONFIG}"))


def _among(given: Path, below: Sequence[str], name: str | None) -> tuple[Path, list[str]]:
    """The directory that is meant, and what is to be said of it."""
    own, begun = _is_adapter(given), os.path.isfile(given / CONFIG)
    if name is not None:
        if name == OWN and (own or OWN not in below):
            return given, []
        if name in below:
            return given / name, []
        there = [*[OWN] * own, *below]
        what = f"holds no adapter {name!r}" + (f", but {', '.join(there)}" if there else "")
        raise refuse(what, str(given), "Take one of these, or leave --adapter-name out")
    if own:
        left = f"{given}: its own adapter is merged; {some_of(below)} in it"
        return given, [f"{left} not (--adapter-name merges such a one)"] * bool(below)
    if not below or (len(below) == 1 and not begun):
        path = given / below[0] if below else given  # which is refused when it is opened
        return path, [f"{given}: the one adapter in it is {path.name}"] * bool(below)
    what = f"holds {len(below)} adapters: {', '.join(below)}"
    if begun:  # axolotl writes the config before it trains
        what = f"has an {CONFIG} without weights: its training did not end. It {what}"
    raise refuse(what, str(given), f"Choose with --adapter-name, such as {below[-1]}")


def _adapters_below(path: Path) -> list[str]:
    """Names of the folders that are adapters, checkpoints by their steps."""
    if not os.path.isdir(path):
        return []
    names = [file.parent.name for file in path.glob(f"*/{CONFIG}") if _is_adapter(file.parent)]
    return sorted(names, key=_by_step)


def _by_step(name: str) -> tuple[str, int, str]:
    number = re.search(r"(\d+)$", name)
    return (name[: number.start()], int(number[1]), name) if number else (name, 0, name)


def _is_adapter(path: Path) -> bool:
    weights = (path / SAFETENSORS, path / PICKLE)
    return os.path.isfile(path / CONFIG) and any(map(os.path.isfile, weights))


def _has_base_weights(path: Path) -> bool:
    return os.path.isdir(path) and any(any(path.glob(name)) for name in _BASE_WEIGHTS)

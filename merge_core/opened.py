"""Base, adapters and device map, opened: all that is wrong with any of them, at once."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace

from merge_core.adapter import Adapter, AdapterWord
from merge_core.asked import Asked
from merge_core.checkpoint import Checkpoint, open_checkpoint
from merge_core.device_map import DeviceMap
from merge_core.errors import InputError, Problem, gathered, refuse
from merge_core.layout import DTYPE_NAMES
from merge_core.named_base import base_named_by
from merge_core.quantised import quantisation_of
from merge_core.side_files import CONFIG
from merge_core.stores.location import Place, is_bare_hub_id, locate
from merge_core.trainer_output import open_named


def open_inputs(
    base: Place | None,
    adapters: Sequence[AdapterWord],
    asked: Asked,
    problems: list[Problem],
) -> tuple[Checkpoint, list[Adapter], DeviceMap | None]:
    """Open everything, and gather what is wrong with it.

    Args:
        base: None: the one that the adapters name.
        problems: where that is added.

    Raises:
        InputError: with all of ``problems``, where there is no base to go on with.
    """
    checkpoint: Checkpoint | None = None
    devices: DeviceMap | None = None
    opened: list[Adapter] = []
    of_adapters: list[Problem] = []
    said: list[str] = []
    with gathered(problems):
        asked.check(len(adapters))
    for word in adapters:
        why = _taken_for_model(word[0] if isinstance(word, tuple) else word)
        with gathered(of_adapters), _explained(why):
            opened.append(open_named(word, asked.adapter_name, asked.access))
            said += why
    with gathered(problems):
        if base is not None:
            why = _taken_for_model(base)
            with _explained(why):
                checkpoint = open_checkpoint(locate(base, asked.access), asked.decode())
            said += why
        elif opened and not of_adapters:
            named = base_named_by(opened, asked.access)
            which = "" if named.is_local else f", which is not on this disk: {named}"
            why = [f"BASE is the one that the adapters name{which}"]
            with _explained(why):
                checkpoint = open_checkpoint(named, asked.decode())
            said += why
    with gathered(problems):
        devices = asked.devices()
    problems += of_adapters
    if checkpoint is None:
        raise InputError(problems)
    with gathered(problems):
        _check_dtype(checkpoint, asked.dtype)
    return replace(checkpoint, notes=(*said, *checkpoint.notes)), opened, devices


def _taken_for_model(word: Place) -> list[str]:
    """What is to be said of a word that could be a path."""
    if not is_bare_hub_id(word):
        return []
    return [f"there is no path {word}: it is taken for a model on the hub"]


@contextlib.contextmanager
def _explained(why: Sequence[str]) -> Iterator[None]:
    """Have what is wrong with a model say why it was looked at, where nobody had asked for it."""
    try:
        yield
    except InputError as error:
        first, *others = error.problems
        told = f"{first.what} ({'; '.join(why)})" if why else first.what
        raise InputError([replace(first, what=told), *others]) from error


def _check_dtype(checkpoint: Checkpoint, asked: str | None) -> None:
    """What comes out of packed weights is of several dtypes, and beside others in the result."""
    decodings = checkpoint.decodings
    if asked is not None or decodings is None or decodings.dtype is not None:
        return
    if quantisation_of(checkpoint.config) is not None:
        what = "names no dtype (torch_dtype) of the weights that come out of the packed ones"
        raise refuse(what, str(checkpoint.path / CONFIG), f"Give --dtype: {', '.join(DTYPE_NAMES)}")

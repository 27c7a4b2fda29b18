"""A base checkpoint, opened from its config, its index and its headers: no tensor is read."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from merge_core.architecture import HEAD, check_architecture
from merge_core.decoding.stored import Stored
from merge_core.errors import InputError, Problem, gathered, refuse
from merge_core.folders import names_in, pinned, read_json
from merge_core.plan import SideFile, Source, StoredHead
from merge_core.quantised import (
    Decodings,
    Read,
    decoded_tensor,
    quantisation_of,
    refuse_packed,
)
from merge_core.side_files import CONFIG, descriptions, find_side_files
from merge_core.stored_head import NOTE, find_stored_head
from merge_core.stores.location import Location
from merge_core.stores.opening import open_store
from merge_core.weight_files import WeightFile, open_weight_files


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """What a base checkpoint consists of."""

    path: Location
    config: Mapping[str, Any]
    files: tuple[WeightFile, ...]
    side_files: tuple[SideFile, ...]
    """Carried over byte for byte: tokenizer, generation config, chat template, licence, ..."""
    notes: tuple[str, ...]
    """What the user should know, though nothing is wrong."""
    decodings: Decodings | None = None
    """Of which weights others come out; None: of none."""
    stored_head: StoredHead | None = None
    """A head that repeats the embeddings, to which it is tied; None: there is none."""

    @property
    def sources(self) -> Mapping[str, Source]:
        """Its tensors as a merge starts from them, by name: packed ones as they come out, tied
        ones once.
        """
        sources = dict(_sources(self.files, self.decodings))
        if self.stored_head is not None:
            del sources[HEAD]
        return sources


Decode = Callable[[Mapping[str, Any], Sequence[Stored], Read, str], Decodings]
"""Finds the weights that are decoded, see ``quantised.read_packed``."""


def open_checkpoint(path: Location, decode: Decode | None = None) -> Checkpoint:
    """Open the checkpoint in the folder ``path``.

    Args:
        decode: finds the weights that are not taken as they are.

    Raises:
        InputError: with every problem found in config, index and headers.
    """
    path = pinned(path)
    names = names_in(path, "BASE", CONFIG)
    _refuse_adapters(path, names)
    problems: list[Problem] = []
    config: dict[str, Any] | None = None
    files: tuple[WeightFile, ...] = ()
    notes: list[str] = []
    with gathered(problems):
        config = read_json(path / CONFIG)
        if decode is None:
            refuse_packed(config, str(path / CONFIG))
    with gathered(problems):
        files = open_weight_files(path, names, notes)
    quantised = config is not None and quantisation_of(config) is not None
    decodings: Decodings | None = None
    stored_head: StoredHead | None = None
    if config is not None and files and (decode is not None or not quantised):
        with gathered(problems):
            if not quantised:
                _refuse_undescribed(path, names, files)
            if decode is not None:
                decodings = _decodings(path, config, files, decode)
                notes += decodings.notes
            sources = dict(_sources(files, decodings))
            shapes = {name: source.tensor.shape for name, source in sources.items()}
            notes += check_architecture(config, shapes, str(path))
            stored_head = find_stored_head(config, sources, str(path))
            notes += [NOTE] * (stored_head is not None)
    side_files: tuple[SideFile, ...] = ()
    with gathered(problems):
        side_files = find_side_files(path, names, quantised=quantised)
    if problems or config is None:
        raise InputError(problems)
    if quantised:
        notes += [
            f"{name} is left out: it describes packed weights" for name in descriptions(names)
        ]
    return Checkpoint(
        path=path,
        config=config,
        files=files,
        side_files=side_files,
        notes=tuple(notes),
        decodings=decodings,
        stored_head=stored_head,
    )


def _refuse_undescribed(
    path: Location, names: Collection[str], files: Sequence[WeightFile]
) -> None:
    """Refuse packed weights of which config.json says nothing, as old packers wrote them."""
    packed = any(tensor.name.endswith(".qweight") for file in files for tensor in file.tensors)
    if packed and (said := descriptions(names)):
        what = f"the base is quantised, which {said[0]} describes and config.json does not"
        remedy = "Put its fields into config.json, as quantization_config with a quant_method"
        raise refuse(what, str(path / said[0]), f"{remedy} such as gptq, and give --dequantize")


def _decodings(
    path: Location, config: Mapping[str, Any], files: Sequence[WeightFile], decode: Decode
) -> Decodings:
    stored = [Stored(file=n, tensor=t) for n, file in enumerate(files) for t in file.tensors]

    def read(one: Stored) -> bytes:
        with closing(open_store(path).open(files[one.file].identity)) as opened:
            return bytes(opened.read(one.tensor.offset, one.tensor.nbytes))

    return decode(config, stored, read, str(path / CONFIG))


def _sources(
    files: Sequence[WeightFile], decodings: Decodings | None
) -> Iterator[tuple[str, Source]]:
    packed = frozenset[str]() if decodings is None else decodings.parts
    for number, file in enumerate(files):
        for tensor in file.tensors:
            if tensor.name not in packed:
                yield tensor.name, Source(tensor=tensor, file=number)
    for name, decoding in ({} if decodings is None else decodings.by_name).items():
        yield name, Source(tensor=decoded_tensor(name, decoding), file=None, decoding=decoding)


def _refuse_adapters(folder: Location, names: Collection[str]) -> None:
    if "adapter_config.json" not in names:
        return
    where = str(folder)
    if CONFIG not in names:
        raise refuse("is an adapter, not a base", where, "Give BASE first, then ADAPTER")
    raise refuse(
        "holds an adapter beside the base, which loaders would apply on top of the result",
        where,
        "Move adapter_config.json and its weights to a directory of their own",
    )

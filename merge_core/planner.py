"""From a base and its adapters to a plan, reading nothing but headers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from merge_core.adapter import Adapter, AdapterWord
from merge_core.architecture import HEAD, embeddings_among
from merge_core.asked import Asked
from merge_core.checkpoint import Checkpoint
from merge_core.combining import combined
from merge_core.completeness import missing_parts
from merge_core.device_map import DeviceMap
from merge_core.errors import InputError, Problem, gathered
from merge_core.layout import DTYPE_NAMES, MERGEABLE, lay_out
from merge_core.lineage import card_of
from merge_core.matched import Matched
from merge_core.matching import check_together, match
from merge_core.named_base import notes_on_base
from merge_core.opened import open_inputs
from merge_core.plan import AdapterInput, MergePlan, Shard, Source, TensorTask
from merge_core.published_config import config_changes
from merge_core.replication import describe_copies, layer_order, replicated
from merge_core.shards import OutputTensor, cut_shards, shard_name
from merge_core.stages import shards_of
from merge_core.stores.location import DEFAULT_ACCESS, Access, Place
from merge_core.stores.opening import lacks_tls
from merge_core.ties import settle_ties, tied_embeddings
from merge_core.tokenizer_choice import TokenizerChoice, choose_tokenizer
from merge_core.tuning import tune
from merge_core.updates import Update
from merge_core.updates.combined import Combination
from merge_core.updates.tuning import Tuning

SHARD_BYTES = 2_000_000_000
"""Default --shard-size. Small enough that a lost worker costs seconds, large enough that a 72B
is some 80 files; the hub's own limit is 5 GB for smooth downloads."""


def make_plan(  # noqa: PLR0913 - one parameter an option
    base: Place | None,
    adapters: Sequence[AdapterWord],
    *,
    adapter_name: str | None = None,
    tokenizer: str | None = None,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    device_map: str | Path | None = None,
    keep_tied: bool = False,
    combination: Combination = Combination(),  # noqa: B008 - frozen
    layers: str | None = None,
    dequantize: bool = False,
    simulate_nf4: bool = False,
    access: Access = DEFAULT_ACCESS,
) -> MergePlan:
    """Plan the merge of ``adapters`` into ``base``, reading nothing but headers.

    Args:
        base: folder of a Qwen1.5 checkpoint in safetensors, see ``stores.location``; None: the one
            that the adapters name.
        adapters: folders of PEFT adapters, or what trainers leave (see ``trainer_output``), each
            with an optional weight: ``path@0.5`` or ``(path, 0.5)``.
        adapter_name: which adapter, where a folder holds several.
        tokenizer: ``base``, or the adapter whose tokenizer the result gets, see
            ``tokenizer_choice``.
        dtype: ``bfloat16``, ``float16`` or ``float32``; None keeps each tensor's own.
        shard_bytes: size limit of an output file, see ``shards.cut_shards``.
        device_map: JSON file that pins modules to devices, see ``device_map``.
        keep_tied: leave tied embeddings and head one tensor, whatever was trained of either.
        combination: how the factors of several adapters become one; their deltas are summed by
            default.
        layers: make only the files with these layers, see ``merge_core.stages``.
        dequantize: decode the weights of a quantised base to the dtype that its config names.
        simulate_nf4: round the weights of a base as QLoRA does it in training.
        access: how object stores are reached.

    Raises:
        InputError: with every problem of the base, the adapters and the options.
    """
    asked = Asked(
        adapter_name=adapter_name,
        tokenizer=tokenizer,
        dtype=dtype,
        shard_bytes=shard_bytes,
        device_map=None if device_map is None else Path(device_map),
        keep_tied=keep_tied,
        combination=combination,
        layers=layers,
        dequantize=dequantize,
        simulate_nf4=simulate_nf4,
        access=access,
    )
    problems: list[Problem] = []
    checkpoint, opened, devices = open_inputs(base, adapters, asked, problems)
    matched = _match(checkpoint, opened, problems, keep_tied=keep_tied)
    updates: Mapping[str, Sequence[Update]] = {}
    if not problems:
        with gathered(problems):
            updates = combined(matched, opened, combination)
    with gathered(problems):
        if devices is not None:
            devices.check(matched.sources)
    brought: TokenizerChoice | None = None
    with gathered(problems):
        embeddings = embeddings_among(matched.sources)
        rows = None if embeddings is None else matched.sources[embeddings].tensor.shape[0]
        brought = choose_tokenizer(checkpoint, opened, rows, tokenizer, access)
    if problems or brought is None:
        raise InputError(problems)
    return _assemble(checkpoint, opened, matched, updates, devices, brought, asked)


def _match(
    checkpoint: Checkpoint, adapters: Sequence[Adapter], problems: list[Problem], *, keep_tied: bool
) -> Matched:
    bases = checkpoint.sources
    order: tuple[int, ...] | None = None
    with gathered(problems):
        order = layer_order(adapters, checkpoint)
    if order is not None:
        bases = replicated(bases, order)
    embeddings = tied_embeddings(checkpoint)
    ends = bases if embeddings is None else {**bases, HEAD: bases[embeddings]}
    for adapter in adapters:
        problems += missing_parts(adapter, ends, checkpoint)
    matched = match(ends, checkpoint, adapters, problems)
    for number, adapter in enumerate(adapters):
        with gathered(problems):
            tune(matched, number, adapter, checkpoint)
    if embeddings is not None:
        settle_ties(matched, embeddings, adapters, keep=keep_tied)
    if order is not None:
        describe_copies(matched, checkpoint.config, order)
    with gathered(problems):
        check_together(matched)
    return matched


def _assemble(
    checkpoint: Checkpoint,
    adapters: Sequence[Adapter],
    matched: Matched,
    updates: Mapping[str, Sequence[Update]],
    devices: DeviceMap | None,
    brought: TokenizerChoice,
    asked: Asked,
) -> MergePlan:
    dtype = asked.dtype
    outputs = [
        OutputTensor(
            name=name,
            dtype=_dtype(matched.dtypes[name], dtype),
            shape=source.tensor.shape,
            device=devices.device_of(name) if devices else None,
        )
        for name, source in matched.sources.items()
    ]
    there = checkpoint.sources
    cut = cut_shards(outputs, asked.shard_bytes)
    shards = tuple(
        _shard(n, shard_name(n + 1, len(cut)), tensors, matched.sources, updates)
        for n, tensors in enumerate(cut)
    )
    recipe = asked.recipe(checkpoint.path, adapters)
    return MergePlan(
        base=checkpoint.path,
        base_files=tuple(file.identity for file in checkpoint.files),
        header_digests=tuple(file.header_digest for file in checkpoint.files),
        config=checkpoint.config,
        config_changes=config_changes(checkpoint.config, matched.config_changes, dtype),
        stored_head=checkpoint.stored_head,
        side_files=brought.side_files,
        adapters=tuple(
            _input(adapter, matched.tunings.get(number)) for number, adapter in enumerate(adapters)
        ),
        twins=tuple(matched.twins),
        keep_tied=asked.keep_tied,
        combination=asked.combination,
        added=tuple(name for name in matched.sources if name not in there),
        card=card_of(checkpoint, adapters, recipe, shards),
        recipe=recipe,
        shards=shards,
        stage=shards_of(shards, asked.layers),
        notes=(
            *checkpoint.notes,
            *matched.notes,
            *brought.notes,
            *[_TOKENIZER] * ("vocab_size" in matched.config_changes and brought.adapter is None),
            *notes_on_base(checkpoint.path, checkpoint.config, adapters),
            *_notes_of(adapters),
            *[_NO_TLS] * lacks_tls(checkpoint.path),
        ),
    )


_TOKENIZER = (
    "the vocabulary was resized, and the tokenizer's files are the base's own: if the training"
    " added tokens, copy its tokenizer into the result"
)

_NO_TLS = (
    "BASE is read over http, without TLS: what changes on the way is noticed by --verify numeric"
    " alone, which reads it once more"
)


def _input(adapter: Adapter, tuning: Tuning | None) -> AdapterInput:
    return AdapterInput(
        path=adapter.path,
        weight=adapter.weight,
        peft_type=adapter.config.peft_type,
        file=adapter.file,
        config_file=adapter.config_file,
        digests={},
        tuning=tuning,
    )


def _notes_of(adapters: Sequence[Adapter]) -> Iterator[str]:
    times = Counter(adapter.path for adapter in adapters)
    yield from (
        f"{path} is given {n} times, and added {n} times" for path, n in times.items() if n > 1
    )
    yield from dict.fromkeys(note for adapter in adapters for note in adapter.notes)


def _shard(
    index: int,
    name: str,
    tensors: Sequence[OutputTensor],
    sources: Mapping[str, Source],
    updates: Mapping[str, Sequence[Update]],
) -> Shard:
    layout = lay_out((t.name, t.dtype, t.shape) for t in tensors)
    tasks = tuple(
        TensorTask(
            target=target,
            source=sources[target.name],
            updates=tuple(updates.get(target.name, ())),
        )
        for target in layout.tensors
    )
    device = tensors[0].device
    return Shard(index=index, name=name, size=layout.size, tasks=tasks, device=device)


def _dtype(of_base: str, asked: str | None) -> str:
    return DTYPE_NAMES[asked] if asked and of_base in MERGEABLE else of_base

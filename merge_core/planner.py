"""From a base and its adapters to a plan, reading nothing but headers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merge_core.adapter import Adapter, open_adapter, parse_adapter
from merge_core.checkpoint import Checkpoint, open_checkpoint
from merge_core.completeness import missing_parts
from merge_core.device_map import DeviceMap, read_device_map
from merge_core.errors import InputError, Problem, gathered
from merge_core.layout import lay_out
from merge_core.matching import Matched, check_together, match
from merge_core.orientation import MERGEABLE
from merge_core.plan import AdapterInput, MergePlan, Shard, Source, TensorTask
from merge_core.shards import OutputTensor, cut_shards, shard_name
from merge_core.ties import HEAD, settle_ties, tied_embeddings
from merge_core.tuning import tune
from merge_core.updates.tuning import Tuning

SHARD_BYTES = 2_000_000_000
"""Default --shard-size. Small enough that a lost worker costs seconds, large enough that a 72B
is some 80 files; the hub's own limit is 5 GB for smooth downloads."""

DTYPE_NAMES: Mapping[str, str] = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
"""Values of --dtype, as config.json spells them."""


def make_plan(
    base: str | Path,
    adapters: Sequence[str | Path],
    *,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    device_map: str | Path | None = None,
    keep_tied: bool = False,
) -> MergePlan:
    """Plan the merge of ``adapters`` into ``base``, reading nothing but headers.

    Args:
        base: directory of a Qwen1.5 checkpoint in safetensors.
        adapters: directories of PEFT adapters, each with an optional weight: ``path@0.5``.
        dtype: ``bfloat16``, ``float16`` or ``float32``; None keeps each tensor's own.
        shard_bytes: size limit of an output file, see ``shards.cut_shards``.
        device_map: JSON file that pins modules to devices, see ``device_map``.
        keep_tied: leave tied embeddings and head one tensor, whatever was trained of either.

    Raises:
        InputError: with every problem of the base, the adapters and the options.
    """
    problems: list[Problem] = []
    checkpoint: Checkpoint | None = None
    opened: list[Adapter] = []
    with gathered(problems):
        _check_options(adapters, dtype, shard_bytes)
    with gathered(problems):
        checkpoint = open_checkpoint(Path(base).absolute())
    devices: DeviceMap | None = None
    with gathered(problems):
        devices = _open_device_map(device_map, checkpoint)
    for text in adapters:
        with gathered(problems):
            path, weight = parse_adapter(text)
            opened.append(open_adapter(path.absolute(), weight))
    if checkpoint is None:
        raise InputError(problems)
    matched = _match(checkpoint, opened, problems, keep_tied=keep_tied)
    if problems:
        raise InputError(problems)
    output = _Output(dtype=dtype, shard_bytes=shard_bytes, devices=devices, keep_tied=keep_tied)
    return _assemble(checkpoint, opened, matched, output)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Output:
    """What the options say about the result."""

    dtype: str | None
    shard_bytes: int
    devices: DeviceMap | None
    keep_tied: bool


def _open_device_map(path: str | Path | None, checkpoint: Checkpoint | None) -> DeviceMap | None:
    if path is None:
        return None
    devices = read_device_map(Path(path).absolute())
    if checkpoint is not None:
        devices.check(tensor.name for file in checkpoint.files for tensor in file.tensors)
    return devices


def _check_options(adapters: Sequence[str | Path], dtype: str | None, shard_bytes: int) -> None:
    problems = []
    if not adapters:
        problems.append(Problem("no adapter given", "ADAPTER", "Name at least one adapter"))
    if dtype is not None and dtype not in DTYPE_NAMES:
        what = f"{dtype!r} is no dtype to merge into"
        problems.append(Problem(what, "--dtype", f"Use one of {', '.join(DTYPE_NAMES)}"))
    if shard_bytes < 1:
        what = f"{shard_bytes} bytes hold no tensor"
        problems.append(Problem(what, "--shard-size", "Give a size such as 2GB"))
    if problems:
        raise InputError(problems)


def _match(
    checkpoint: Checkpoint, adapters: Sequence[Adapter], problems: list[Problem], *, keep_tied: bool
) -> Matched:
    bases = {
        tensor.name: Source(tensor=tensor, file=number)
        for number, file in enumerate(checkpoint.files)
        for tensor in file.tensors
    }
    for adapter in adapters:
        problems += missing_parts(adapter, bases, checkpoint)
    embeddings = tied_embeddings(checkpoint)
    ends = bases if embeddings is None else {**bases, HEAD: bases[embeddings]}
    matched = match(ends, checkpoint, adapters, problems)
    for number, adapter in enumerate(adapters):
        with gathered(problems):
            tune(matched, number, adapter, checkpoint)
    if embeddings is not None:
        settle_ties(matched, embeddings, adapters, keep=keep_tied)
    with gathered(problems):
        check_together(matched)
    return matched


def _assemble(
    checkpoint: Checkpoint, adapters: Sequence[Adapter], matched: Matched, output: _Output
) -> MergePlan:
    dtype, devices = output.dtype, output.devices
    outputs = [
        OutputTensor(
            name=name,
            dtype=_dtype(matched.dtypes[name], dtype),
            shape=source.tensor.shape,
            device=devices.device_of(name) if devices else None,
        )
        for name, source in matched.sources.items()
    ]
    there = {tensor.name for file in checkpoint.files for tensor in file.tensors}
    cut = cut_shards(outputs, output.shard_bytes)
    return MergePlan(
        base=checkpoint.path,
        base_files=tuple(file.identity for file in checkpoint.files),
        header_digests=tuple(file.header_digest for file in checkpoint.files),
        config=checkpoint.config,
        config_changes=_config_changes(checkpoint.config, matched, dtype),
        side_files=checkpoint.side_files,
        adapters=tuple(
            _input(adapter, matched.tunings.get(number)) for number, adapter in enumerate(adapters)
        ),
        twins=tuple(matched.twins),
        keep_tied=output.keep_tied,
        added=tuple(name for name in matched.sources if name not in there),
        shards=tuple(
            _shard(n, shard_name(n + 1, len(cut)), tensors, matched)
            for n, tensors in enumerate(cut)
        ),
        notes=(*checkpoint.notes, *matched.notes, *_notes_of(adapters)),
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


def _shard(index: int, name: str, tensors: Sequence[OutputTensor], matched: Matched) -> Shard:
    layout = lay_out((t.name, t.dtype, t.shape) for t in tensors)
    tasks = tuple(
        TensorTask(
            target=target,
            source=matched.sources[target.name],
            updates=tuple(matched.updates.get(target.name, ())),
        )
        for target in layout.tensors
    )
    device = tensors[0].device
    return Shard(index=index, name=name, size=layout.size, tasks=tasks, device=device)


def _dtype(of_base: str, asked: str | None) -> str:
    return DTYPE_NAMES[asked] if asked and of_base in MERGEABLE else of_base


def _config_changes(
    config: Mapping[str, Any], matched: Matched, dtype: str | None
) -> dict[str, Any]:
    """Transformers 5 writes ``dtype``, older ones ``torch_dtype``: both say the same after it."""
    changes = dict(matched.config_changes)
    if dtype is not None:
        keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["torch_dtype"]
        changes |= dict.fromkeys(keys, dtype)
    return {key: value for key, value in changes.items() if config.get(key) != value}

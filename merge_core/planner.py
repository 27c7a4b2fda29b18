"""From a base and its adapters to a plan, reading nothing but headers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merge_core.adapter import Adapter, open_adapter, parse_adapter
from merge_core.architecture import is_tied
from merge_core.checkpoint import Checkpoint, open_checkpoint
from merge_core.device_map import DeviceMap, read_device_map
from merge_core.errors import InputError, Problem, gathered, refuse, some_of
from merge_core.layout import TensorSpec, lay_out
from merge_core.orientation import MERGEABLE, is_transposed
from merge_core.plan import AdapterInput, LowRankUpdate, MergePlan, SavedCopy, Shard, TensorTask
from merge_core.shards import OutputTensor, cut_shards, shard_name

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
) -> MergePlan:
    """Plan the merge of ``adapters`` into ``base``, reading nothing but headers.

    Args:
        base: directory of a Qwen1.5 checkpoint in safetensors.
        adapters: directories of PEFT adapters, each with an optional weight: ``path@0.5``.
        dtype: ``bfloat16``, ``float16`` or ``float32``; None keeps each tensor's own.
        shard_bytes: size limit of an output file, see ``shards.cut_shards``.
        device_map: JSON file that pins modules to devices, see ``device_map``.

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
    updates: dict[str, list[LowRankUpdate]] = {}
    if checkpoint is not None:
        updates = _match_updates(checkpoint, opened, problems)
    if problems or checkpoint is None:
        raise InputError(problems)
    output = _Output(dtype=dtype, shard_bytes=shard_bytes, devices=devices)
    return _assemble(checkpoint, opened, updates, output)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Output:
    """What the options say about the result."""

    dtype: str | None
    shard_bytes: int
    devices: DeviceMap | None


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


def _match_updates(
    checkpoint: Checkpoint, adapters: Sequence[Adapter], problems: list[Problem]
) -> dict[str, list[LowRankUpdate]]:
    """Updates by the name of the base tensor that they change, in the order of the adapters."""
    bases = {tensor.name: tensor for file in checkpoint.files for tensor in file.tensors}
    updates: dict[str, list[LowRankUpdate]] = {}
    for index, adapter in enumerate(adapters):
        missing = []
        for module, pair in adapter.pairs.items():
            name = f"{module}.weight"
            if name not in bases:
                missing.append(name)
                continue
            with gathered(problems):
                at = f"{adapter.path}, module {module}"
                if module == "lm_head" and is_tied(checkpoint.config):
                    raise _tied_head(at)
                if "embed" in module.rpartition(".")[2]:
                    what = "has linear factors on an embedding, which PEFT never writes"
                    raise refuse(what, at, "Save the adapter again with PEFT")
                transposed = is_transposed(bases[name], pair.a, pair.b, adapter, checkpoint, at)
                updates.setdefault(name, []).append(
                    LowRankUpdate(
                        adapter=index,
                        a=pair.a,
                        b=pair.b,
                        scaling=pair.scaling * adapter.weight,
                        transposed=transposed,
                    )
                )
        problems += _unmatched(missing, adapter, checkpoint)
        problems += _without_factors(bases, adapter, checkpoint)
        problems += [
            Problem(
                f"carries a {copy.dtype} {list(copy.shape)} copy of {module}.weight, which is"
                f" {base.dtype} {list(base.shape)} in the base",
                str(adapter.path),
                "Give the base that this adapter was trained on; resized ones are not merged yet",
            )
            for module, copy in adapter.copies.items()
            if (base := bases.get(f"{module}.weight")) and base.shape != copy.shape
        ]
    return updates


def _tied_head(at: str) -> InputError:
    return refuse(
        "LoRA on an lm_head that is tied to the embeddings is not merged yet",
        at,
        "Untie the base first, or merge this adapter with PEFT",
    )


def _unmatched(missing: list[str], adapter: Adapter, checkpoint: Checkpoint) -> list[Problem]:
    if not missing:
        return []
    if missing == ["lm_head.weight"] and is_tied(checkpoint.config):
        return list(_tied_head(f"{adapter.path}, module lm_head").problems)
    listed = some_of(missing)
    return [
        Problem(
            f"the base has no {listed}",
            str(adapter.path),
            "Give the base that this adapter was trained on",
        )
    ]


def _without_factors(
    bases: Mapping[str, TensorSpec], adapter: Adapter, checkpoint: Checkpoint
) -> list[Problem]:
    """Modules that the config says were trained, but that the file holds nothing for.

    Only for dense Qwen1.5, whose modules are known: PEFT gives each of them factors.
    """
    if checkpoint.config.get("model_type") != "qwen2":
        return []
    modules = [name.removesuffix(".weight") for name, t in bases.items() if len(t.shape) == 2]
    lost = [m for m in modules if m not in adapter.pairs and adapter.config.is_target(m)]
    if not lost:
        return []
    listed = some_of(lost)
    what = f"target_modules covers {listed}, for which the file holds no factors"
    return [Problem(what, str(adapter.path), "Save the adapter again; part of it is missing")]


def _assemble(
    checkpoint: Checkpoint,
    adapters: Sequence[Adapter],
    updates: Mapping[str, Sequence[LowRankUpdate]],
    output: _Output,
) -> MergePlan:
    dtype, devices = output.dtype, output.devices
    sources = {t.name: (n, t) for n, file in enumerate(checkpoint.files) for t in file.tensors}
    outputs = [
        OutputTensor(
            name=tensor.name,
            dtype=DTYPE_NAMES[dtype] if dtype and tensor.dtype in MERGEABLE else tensor.dtype,
            shape=tensor.shape,
            device=devices.device_of(tensor.name) if devices else None,
        )
        for _, tensor in sources.values()
    ]
    cut = cut_shards(outputs, output.shard_bytes)
    return MergePlan(
        base=checkpoint.path,
        base_files=tuple(file.identity for file in checkpoint.files),
        header_digests=tuple(file.header_digest for file in checkpoint.files),
        config=checkpoint.config,
        config_changes=_config_changes(checkpoint.config, dtype),
        side_files=checkpoint.side_files,
        adapters=tuple(
            AdapterInput(
                path=a.path,
                weight=a.weight,
                file=a.file,
                config_file=a.config_file,
                factor_digests={},
                copies=tuple(
                    SavedCopy(copy=copy, source=source, source_file=file)
                    for module, copy in a.copies.items()
                    for file, source in [sources[f"{module}.weight"]]
                ),
            )
            for a in adapters
        ),
        shards=tuple(
            _shard(n, shard_name(n + 1, len(cut)), tensors, sources, updates)
            for n, tensors in enumerate(cut)
        ),
        notes=(*checkpoint.notes, *_notes_of(adapters)),
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
    sources: Mapping[str, tuple[int, TensorSpec]],
    updates: Mapping[str, Sequence[LowRankUpdate]],
) -> Shard:
    layout = lay_out((t.name, t.dtype, t.shape) for t in tensors)
    tasks = tuple(
        TensorTask(
            target=target,
            source=sources[target.name][1],
            source_file=sources[target.name][0],
            updates=tuple(updates.get(target.name, ())),
        )
        for target in layout.tensors
    )
    device = tensors[0].device
    return Shard(index=index, name=name, size=layout.size, tasks=tasks, device=device)


def _config_changes(config: Mapping[str, Any], dtype: str | None) -> dict[str, Any]:
    """Transformers 5 writes ``dtype``, older ones ``torch_dtype``: both say the same after it."""
    if dtype is None:
        return {}
    keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["torch_dtype"]
    return {key: dtype for key in keys if config.get(key) != dtype}

"""Which layers of the base a tuner other than LoRA changes, and whether its tensors fit them."""

from __future__ import annotations

import contextlib
import importlib.metadata
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from merge_core.adapter import Adapter
from merge_core.architecture import CONV1D_MODELS, LINEAR_MODELS, expected_tensors
from merge_core.checkpoint import Checkpoint
from merge_core.config_values import at_end
from merge_core.errors import InputError, Problem, gathered, refuse, some_of
from merge_core.matched import Matched
from merge_core.orientation import check_mergeable
from merge_core.peft_tuners import TUNERS
from merge_core.tuned import MismatchError, Sizes, check_parts, check_shared, unlike_others
from merge_core.tuner import Tuner
from merge_core.updates import PeftUpdate
from merge_core.updates.tuning import Kind, Layer, Others, Tuning, rank_of

_OTHER_BASE = "Give the base that this adapter was trained on"
_OTHER_CONFIG = "Use the adapter_config.json that was saved with these weights"
_WITH_PEFT = "Merge this adapter with PEFT's merge_and_unload"

_PATTERNS = {
    "rank_pattern": "r",
    "block_size_pattern": "block_size",
    "n_frequency_pattern": "n_frequency",
}
"""Fields that give some layers another value of a field than the config's own."""


def tune(matched: Matched, number: int, adapter: Adapter, checkpoint: Checkpoint) -> None:
    """Have the layers of adapter ``number`` merged by PEFT, if its type is such a tuner.

    Raises:
        InputError: with every layer that fits no tensor of the base, or lacks some of its own.
    """
    tuner = TUNERS.get(adapter.config.peft_type)
    if tuner is None:
        return
    problems: list[Problem] = []
    layers: list[Layer] = []
    for path in _paths(matched, adapter, tuner, checkpoint):
        with gathered(problems):
            layers.append(_layer(matched, adapter, tuner, path, checkpoint))
    with gathered(problems):
        _check_tensors(adapter, tuner, layers)
    if problems:
        raise InputError(problems)
    _check_needs(tuner, str(adapter.path))
    fields = adapter.config.fields
    for note in filter(
        None, [tuner.note, *(n for name, n in tuner.notes.items() if fields.get(name))]
    ):
        matched.notes.append(f"{adapter.path}: {adapter.config.peft_type}: {note}")
    matched.tunings[number] = Tuning(
        config={k: v for k, v in fields.items() if k not in _PROVENANCE},
        layers=tuple(layers),
        others=tuner.others,
        peft=_installed_peft(str(adapter.path)),
        shared=tuple(adapter.trained.tuned.shared.values()),
        copies=tuner.copies,
        squares=tuner.squares,
        always=_dealt_out(layers, adapter) if tuner.others == Others.ALL else 0,
    )
    for layer in layers:
        _update(matched, number, adapter, layer, tuner)


def _update(matched: Matched, number: int, adapter: Adapter, layer: Layer, tuner: Tuner) -> None:
    for part in tuner.changes:
        if part == "weight" or layer.bias:
            update = PeftUpdate(
                adapter=number,
                layer=layer,
                part=part,
                tensors=tuple(adapter.trained.tuned.layers.get(layer.path, {}).values()),
                weight=adapter.weight,
            )
            matched.add(f"{layer.path}.{part}", update)


def _dealt_out(layers: list[Layer], adapter: Adapter) -> int:
    """Float32 numbers for the places in one vector of all layers' factors: eight bytes for each,
    their copies while they are drawn, and a scale.
    """
    return 12 * rank_of(adapter.config.fields) * sum(sum(layer.shape) for layer in layers)


TESTED_PEFT = "0.21"
"""The release whose layers the tests compare with. What is merged is what they make of it, and that
has changed between releases."""


def _installed_peft(where: str) -> str:
    """Its version, without importing it."""
    remedy = f"Install peft {TESTED_PEFT}, on every machine"
    try:
        version = importlib.metadata.version("peft")
    except importlib.metadata.PackageNotFoundError:
        raise refuse("PEFT merges it, and is not installed here", where, remedy) from None
    if version.split(".")[:2] != TESTED_PEFT.split("."):
        what = f"PEFT merges it, and {version} is installed, which no test compares with"
        raise refuse(what, where, remedy)
    return version


def _check_needs(tuner: Tuner, where: str) -> None:
    if tuner.needs:
        try:
            importlib.metadata.version(tuner.needs)
        except importlib.metadata.PackageNotFoundError:
            what = f"PEFT builds its layers with {tuner.needs}, which is not installed here"
            remedy = f"pip install {tuner.needs}, on every machine"
            raise refuse(what, where, remedy) from None


_PROVENANCE = frozenset({"base_model_name_or_path", "revision", "auto_mapping", "peft_version"})
"""Fields that say where an adapter comes from: the same merge may have others."""


def _paths(matched: Matched, adapter: Adapter, tuner: Tuner, checkpoint: Checkpoint) -> list[str]:
    """The modules that were trained, in the order of the model as far as it is known."""
    known = checkpoint.config.get("model_type") == "qwen2"
    names = dict(expected_tensors(checkpoint.config)) if known else matched.sources
    order = [name.removesuffix(".weight") for name in names if name.endswith(".weight")]
    found = set(adapter.trained.tuned.layers)
    at = str(adapter.path)
    if tuner.others in (Others.ALL, Others.NUMBER):
        if not known:
            what = f"{adapter.config.peft_type} depends on the order of the layers"
            raise refuse(f"{what}, which is known of Qwen2 alone", at, _WITH_PEFT)
        if not found:  # the file holds nothing that is of a layer
            found = {path for path in order if _is_target(matched, adapter, path)}
    if not found:
        what = "the file holds nothing of any layer, and the config does not list the layers"
        raise refuse(what, at, _WITH_PEFT)
    return [path for path in order if path in found] + sorted(found.difference(order))


def _is_target(matched: Matched, adapter: Adapter, path: str) -> bool:
    shape = matched.sources[f"{path}.weight"].tensor.shape
    return len(shape) == 2 and adapter.config.is_target(path) and not adapter.config.is_saved(path)


def _layer(
    matched: Matched, adapter: Adapter, tuner: Tuner, path: str, checkpoint: Checkpoint
) -> Layer:
    at = f"{adapter.path}, module {path}"
    weight, bias = (matched.sources.get(f"{path}.{part}") for part in ("weight", "bias"))
    if weight is None:
        raise refuse(f"the base has no {path}.weight", at, _OTHER_BASE)
    check_mergeable(weight.tensor, at)
    if len(weight.tensor.shape) != 2:
        what = f"the base tensor is {list(weight.tensor.shape)}, which is no layer of a tuner"
        raise refuse(what, at, _OTHER_BASE)
    kind = _kind(path, adapter, checkpoint, at)
    if kind not in tuner.kinds:
        what = f"{adapter.config.peft_type} on a layer that is {kind} is not merged"
        raise refuse(what, at, _WITH_PEFT)
    if adapter.config.peft_type == "KASA" and f"{path}.weight" in adapter.trained.whole:
        what = "the base's weight is in the file, cut down already, and KaSA would cut it once more"
        raise refuse(what, at, "Save the adapter with save_embedding_layers=False")
    if "weight" not in tuner.changes and bias is None:
        what = "the base has no bias there that could take what was trained"
        raise refuse(what, at, _OTHER_BASE)
    return Layer(path=path, kind=kind, shape=weight.tensor.shape, bias=bias is not None)


def _kind(path: str, adapter: Adapter, checkpoint: Checkpoint, at: str) -> Kind:
    model, last = checkpoint.config.get("model_type"), path.rpartition(".")[2]
    if last in ("embed_tokens", "wte", "wpe"):
        return Kind.EMBEDDING
    if model in CONV1D_MODELS and last != "lm_head":
        return Kind.CONV1D
    if adapter.config.fan_in_fan_out and model not in (*LINEAR_MODELS, *CONV1D_MODELS):
        what = f"fan_in_fan_out is set, and nothing tells which layers of {model!r} are Conv1D"
        raise refuse(what, at, _WITH_PEFT)
    return Kind.LINEAR


def _check_tensors(adapter: Adapter, tuner: Tuner, layers: list[Layer]) -> None:
    tuned, problems = adapter.trained.tuned, list[Problem]()
    config, shared = adapter.config.fields, dict[str, int]()
    ins = [_in_out(layer) for layer in layers]
    if ins:
        wide, tall = max(i for i, _ in ins), max(o for _, o in ins)
        shared |= {"widest": wide, "tallest": tall}
        shared |= {"longer": max(wide, tall), "shorter": min(wide, tall)}
    with _gathered(problems, str(adapter.path)):
        shared |= _sizes_of(config, tuner, "")
        check_shared(tuned.shared, tuner, config, shared)
    for layer, (wide, tall) in zip(layers, ins, strict=True):
        with _gathered(problems, f"{adapter.path}, module {layer.path}"):
            sizes = shared | _sizes_of(config, tuner, layer.path) | _share_of(layer, layers, config)
            sizes |= {
                "in": wide,
                "out": tall,
                "least": min(wide, tall),
                "affine": wide + layer.bias,
            }
            check_parts(tuned.layers.get(layer.path, {}), tuner, sizes)
    for path, lacking in unlike_others(tuned.layers, tuner):
        what = f"{some_of(lacking)} is missing, which other layers have"
        problems.append(Problem(what, f"{adapter.path}, module {path}", _OTHER_CONFIG))
    if problems:
        raise InputError(problems)


def _in_out(layer: Layer) -> tuple[int, int]:
    first, second = layer.shape
    return (second, first) if layer.kind == Kind.LINEAR else (first, second)


def _sizes_of(config: Mapping[str, Any], tuner: Tuner, path: str) -> Sizes:
    """What the fields of the config say about the sizes of a layer.

    As PEFT does (``get_pattern_key``), the first key of a pattern counts that is the layer's. The
    patterns of ADALORA are masks, by which its ranks shrank.
    """
    sizes = {n: v for n, v in config.items() if n in tuner.fields and type(v) is int}
    for pattern, name in _PATTERNS.items():
        found = (v for k, v in (config.get(pattern) or {}).items() if at_end(k).match(path))
        if type(value := next(found, None)) is int:
            sizes[name] = value
    if config["peft_type"] == "ADALORA" and config.get("rank_pattern"):
        sizes.pop("init_r", None)
    return sizes


def _share_of(layer: Layer, layers: Sequence[Layer], config: Mapping[str, Any]) -> Sizes:
    """WAVEFT may deal out its frequencies by the sizes of all layers (``waveft/model.py``)."""
    each = config.get("n_frequency")
    if not config.get("proportional_parameters") or type(each) is not int:
        return {}
    share = math.prod(layer.shape) / sum(math.prod(one.shape) for one in layers)
    return {"n_frequency": max(1, round(share * (each * len(layers))))}


@contextlib.contextmanager
def _gathered(problems: list[Problem], where: str) -> Iterator[None]:
    try:
        yield
    except MismatchError as mismatch:
        problems.append(Problem(str(mismatch), where, _OTHER_CONFIG))

"""A quantised base: which stored tensors make up which weight, found from headers.

Beside the headers two kinds of small things are read: what a format stores as a description of its
tensors, and biases that should be nothing but zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from merge_core.architecture import CONV1D_MODELS, LINEAR_MODELS
from merge_core.decoding import Decoding
from merge_core.decoding.awq import AwqFormat
from merge_core.decoding.bitsandbytes import BitsAndBytesFormat
from merge_core.decoding.fields import REMEDY
from merge_core.decoding.fp8 import Fp8Format
from merge_core.decoding.gptq import GptqFormat
from merge_core.decoding.module import FETCH, PackedModule
from merge_core.decoding.stored import Stored
from merge_core.errors import InputError, Problem, counted, gathered, refuse, shortened, some_of
from merge_core.layout import DTYPE_NAMES, MERGEABLE, TensorSpec, tensor_bytes

_NEVER_BIASED = ("o_proj", "gate_proj", "up_proj", "down_proj")
"""Layers that have no bias in any Qwen2; GPTQ's packers wrote one of zeros for every layer."""

_DESCRIPTION = 1 << 20
"""More bytes than any description or bias has that is read while planning."""

Read = Callable[[Stored], bytes]
"""Reads a stored tensor."""


class Format(Protocol):
    """One of the formats below, as a ``quantization_config`` sets it."""

    @property
    def parts(self) -> frozenset[str]:
        """What can stand behind a module's path."""
        ...

    def decoding(self, module: PackedModule) -> Decoding:
        """How the module's weight comes out; raises InputError if its parts do not fit."""
        ...


_FORMATS: Mapping[str, Callable[[Mapping[str, Any], str], Format]] = {
    "awq": AwqFormat.of,
    "bitsandbytes": BitsAndBytesFormat.of,
    "fp8": Fp8Format.of,
    "gptq": GptqFormat.of,
}
"""By ``quant_method``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decodings:
    """The weights of a base that do not lie there as a merge wants them."""

    by_name: Mapping[str, Decoding]
    """By the name of the tensor that comes out."""
    parts: frozenset[str]
    """Names of the stored tensors that go into it, or that are left out."""
    dtype: str | None
    """That they get in the result; None: the one that comes out."""
    notes: tuple[str, ...]


def quantisation_of(config: Mapping[str, Any]) -> Any:
    """What config.json says about it; None if the base is not quantised."""
    return config.get("quantization_config") or None


def refuse_packed(config: Mapping[str, Any], where: str) -> None:
    """Refuse a quantised base that is not to be decoded.

    Raises:
        InputError: it is one.
    """
    if quantisation_of(config) is None:
        return
    method = _method(config)
    remedy = "Give --dequantize to merge into its weights as 16 bits"
    if method not in _FORMATS:
        remedy = REMEDY
    named = shortened(method) if method else "unknown method"
    what = f"the base is quantised ({named}), which cannot take a LoRA delta as it is"
    raise refuse(what, where, remedy)


def read_packed(
    config: Mapping[str, Any], tensors: Sequence[Stored], read: Read, where: str
) -> Decodings:
    """Account for every packed tensor of a base.

    Args:
        tensors: all of them.
        read: for small ones.
        where: config.json, for messages.

    Raises:
        InputError: with every part that is missing, left over or does not fit.
    """
    if quantisation_of(config) is None:
        what = "the base is not quantised: there is nothing to decode"
        raise refuse(what, where, "Leave --dequantize out")
    method = _method(config) or "unknown method"
    if method not in _FORMATS:
        what = f"the base is quantised ({shortened(method)}), which is not decoded"
        raise refuse(what, where, REMEDY)
    if config.get("model_type") in CONV1D_MODELS:
        what = "its layers store [in, out], and packed ones [out, in]: this is not decoded"
        raise refuse(what, where, REMEDY)
    form = _FORMATS[method](quantisation_of(config), where)
    modules, small = _modules(form, tensors), _small(read, where)
    problems: list[Problem] = []
    if not modules:
        what = f"quantization_config says {form}, and no tensor is packed like that"
        problems.append(Problem(what, where, FETCH))
    decodings: dict[str, Decoding] = {}
    for path, parts in modules.items():
        with gathered(problems):
            module = PackedModule(path=path, parts=parts, where=where, read=small)
            decodings[f"{path}.weight"] = form.decoding(module)
    used = {stored.tensor.name for parts in modules.values() for stored in parts.values()}
    rest = [stored for stored in tensors if stored.tensor.name not in used]
    problems += _left_over(rest, modules, where)
    zeros: list[str] = []
    with gathered(problems):
        zeros = _empty_biases(rest, config, modules, small, where)
    if problems:
        raise InputError(problems)
    notes = [f"{counted(len(decodings), 'weight')} of the base decoded from {form}"]
    if zeros:
        notes.append(f"{counted(len(zeros), 'tensor')} left out, biases of zeros: {some_of(zeros)}")
    return Decodings(
        by_name=decodings,
        parts=frozenset([*used, *zeros]),
        dtype=_dtype_of(config),
        notes=tuple(notes),
    )


def decoded_tensor(name: str, decoding: Decoding) -> TensorSpec:
    """What comes out, which lies in no file."""
    dtype, shape = decoding.dtype, decoding.shape
    size = tensor_bytes(dtype, shape)
    return TensorSpec(name=name, dtype=dtype, shape=shape, offset=0, nbytes=size)


def _dtype_of(config: Mapping[str, Any]) -> str | None:
    """The dtype that a model is loaded in, as transformers 5 or as older ones say it."""
    said = config.get("dtype", config.get("torch_dtype"))
    return DTYPE_NAMES.get(said) if isinstance(said, str) else None


def _method(config: Mapping[str, Any]) -> str | None:
    quantisation = quantisation_of(config)
    method = quantisation.get("quant_method") if isinstance(quantisation, dict) else None
    return method if isinstance(method, str) else None


def _modules(form: Format, tensors: Sequence[Stored]) -> dict[str, dict[str, Stored]]:
    """The packed parts by module. A ``weight`` alone is one that was left as it was."""
    modules: dict[str, dict[str, Stored]] = {}
    for stored in tensors:
        name = stored.tensor.name
        for part in form.parts:
            if name.endswith(f".{part}"):
                modules.setdefault(name.removesuffix(f".{part}"), {})[part] = stored
    return {path: parts for path, parts in modules.items() if not _is_plain(parts)}


def _is_plain(parts: Mapping[str, Stored]) -> bool:
    return parts.keys() == {"weight"} and parts["weight"].tensor.dtype in MERGEABLE


def _left_over(
    rest: Sequence[Stored], modules: Mapping[str, object], where: str
) -> Iterator[Problem]:
    """Tensors that are no values, and belong to no packed weight; weights that are there twice."""
    for stored in rest:
        name, dtype = stored.tensor.name, stored.tensor.dtype
        if dtype not in MERGEABLE:
            what = f"tensor {name!r} is {dtype}, and no part of a packed weight"
            yield Problem(what, where, FETCH)
        elif name.removesuffix(".weight") in modules:
            yield Problem(f"tensor {name!r} is there beside its packed parts", where, FETCH)


def _empty_biases(
    rest: Sequence[Stored],
    config: Mapping[str, Any],
    modules: Mapping[str, object],
    read: Read,
    where: str,
) -> list[str]:
    """Biases that the model has no place for, all of them zeros."""
    if config.get("model_type") not in LINEAR_MODELS:
        return []
    zeros, problems = [], []
    for stored in rest:
        path, _, kind = stored.tensor.name.rpartition(".")
        if kind != "bias" or path not in modules or not path.endswith(_NEVER_BIASED):
            continue
        if any(read(stored)):
            what = f"tensor {stored.tensor.name!r} is a bias that the model has no place for"
            problems.append(Problem(f"{what}, and is not zero", where, FETCH))
        zeros.append(stored.tensor.name)
    if problems:
        raise InputError(problems)
    return zeros


def _small(read: Read, where: str) -> Read:
    """Reads what is as small as it should be."""

    def checked(stored: Stored) -> bytes:
        if stored.tensor.nbytes > _DESCRIPTION:
            what = f"tensor {stored.tensor.name!r} has {stored.tensor.nbytes} bytes"
            raise refuse(f"{what}, too many for what it is", where, FETCH)
        return read(stored)

    return checked
